"""No leak: what a model predicts never depends on the answer. By certificate, by Jacobian, and bit for bit."""

from collections.abc import Callable

import pytest
import torch
from attention_samples import IMAGE, PAD, RESPONSE, TEXT, ids_of_rows, rectangle, row_of, square_images
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aki_megatron.attention import AttentionMask, LeakError, attend
from aki_megatron.attention.dense import attend_masked
from aki_megatron.attention.leak_check import assert_no_leak
from aki_megatron.attention.reference_mask import dense_mask
from aki_megatron.attention.rules import RuleOptions

SOME = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Transformer(nn.Module):
    """A small transformer in float64 whose only mixing of tokens is the attention given; 4 heads over 2 key heads."""

    def __init__(self, layers: int, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projections = nn.ModuleList(nn.Linear(width, 2 * width, dtype=torch.float64) for _ in range(layers))
        self.mixers = nn.ModuleList(nn.Linear(width, width, dtype=torch.float64) for _ in range(layers))

    def forward(self, hidden: Tensor, attention: Attention) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        for project, mix in zip(self.projections, self.mixers, strict=True):
            heads = project(hidden).unflatten(-1, (8, 4)).transpose(1, 2) * 2.0
            seen = attention(*heads.split((4, 2, 2), dim=1)).transpose(1, 2).flatten(2)
            hidden = hidden + torch.tanh(mix(seen))
        return hidden


def influence(layers: int, scored: Tensor, segment_ids: Tensor, attention: Attention) -> float:
    """Largest |d hidden[t] / d input[j]| over scored rows t and later tokens j."""
    torch.manual_seed(1)
    hidden = torch.randn(*scored.shape, 16, dtype=torch.float64, requires_grad=True)
    out = Transformer(layers)(hidden, attention)
    largest = 0.0
    for b, t in scored.nonzero().tolist():
        (gradient,) = torch.autograd.grad(
            (out[b, t] * torch.randn(16, dtype=torch.float64)).sum(), hidden, retain_graph=True
        )
        assert gradient[b, : t + 1].abs().max() > 0
        assert not gradient[:b].any()
        assert not gradient[b + 1 :].any()
        assert not gradient[b][segment_ids[b] != segment_ids[b, t]].any()
        largest = max(largest, float(gradient[b, t + 1 :].abs().max()) if t + 1 < scored.shape[1] else 0.0)
    return largest


LEGAL = {
    "one turn": [row_of((TEXT, 2), (IMAGE, 4), (TEXT, 3), (RESPONSE, 3))],
    "text before image": [row_of((TEXT, 4), (IMAGE, 4), (TEXT, 1), (RESPONSE, 3))],
    "caption": [row_of((TEXT, 1), (IMAGE, 4), (RESPONSE, 5))],
    "three turns, two images": [
        row_of(
            (IMAGE, 4),
            (TEXT, 2),
            (RESPONSE, 2),
            (TEXT, 1),
            (IMAGE, 4),
            (TEXT, 2),
            (RESPONSE, 2),
            (TEXT, 2),
            (RESPONSE, 1),
        )
    ],
    "packed": [row_of((IMAGE, 4), (TEXT, 2), (RESPONSE, 2)), row_of((TEXT, 1), (IMAGE, 4), (TEXT, 2), (RESPONSE, 3))],
}


def scored_rows(modality: Tensor, segment: Tensor) -> Tensor:
    """Rows whose next token is a response of the same segment: what training learns."""
    scored = torch.zeros(modality.shape, dtype=torch.bool)
    scored[:, :-1] = (modality[:, 1:] == RESPONSE) & (segment[:, 1:] == segment[:, :-1])
    return scored


@pytest.mark.parametrize("rule", ["causal", "mma", "mma_general", "mixed", "cca"])
@pytest.mark.parametrize("name", LEGAL)
def test_legal_layouts_have_exactly_no_influence_from_later_tokens(name: str, rule: str) -> None:
    modality, segment = rectangle(LEGAL[name], [row_of((TEXT, 3), (RESPONSE, 2))])
    scored = scored_rows(modality, segment)
    layout = AttentionMask.build(modality, segment, rule=rule, scored=scored)
    for layers in (2, 3):
        for backend in ("cpu", "masked"):
            assert influence(layers, scored, segment, lambda q, k, v: attend(q, k, v, layout, backend=backend)) == 0.0  # noqa: B023


@pytest.mark.parametrize("rule", ["mma", "mma_general", "mixed", "cca"])
def test_changing_the_answer_changes_no_bit_before_it(rule: str) -> None:
    modality, segment = rectangle(LEGAL["three turns, two images"])
    scored = scored_rows(modality, segment)
    layout = AttentionMask.build(modality, segment, rule=rule, scored=scored)
    model, hidden = Transformer(3), torch.randn(*scored.shape, 16, dtype=torch.float64)

    def run(hidden: Tensor) -> Tensor:
        return model(hidden, lambda q, k, v: attend(q, k, v, layout, backend="cpu"))

    before = run(hidden)
    for t in scored[0].nonzero().flatten().tolist():
        changed = hidden.clone()
        changed[0, t + 1 :] = torch.randn(len(hidden[0]) - t - 1, 16, dtype=torch.float64)
        after = run(changed)
        assert torch.equal(after[0, : t + 1][scored[0, : t + 1]], before[0, : t + 1][scored[0, : t + 1]])
        assert not torch.equal(after, before)


def edges_of(mask: Tensor) -> Tensor:
    """Every look-ahead edge (row, column) of one mask [T, T]."""
    return mask.triu(1).nonzero()


def illegal(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Modality, segment and scored of a layout that leaks, and its mask [1, T, T]."""
    if name == "caption under mma":
        # a caption whose text was not marked as RESPONSE: the image reads what is to be predicted
        modality, segment = rectangle([row_of((TEXT, 1), (IMAGE, 4), (TEXT, 5))])
        scored = torch.zeros(modality.shape, dtype=torch.bool)
        scored[0, 4:9] = True
        return modality, segment, scored, dense_mask(modality, segment, "mma", RuleOptions())
    two_turns = row_of((TEXT, 1), (IMAGE, 4), (TEXT, 2), (RESPONSE, 3), (TEXT, 3), (RESPONSE, 2))
    modality, segment = rectangle([two_turns])
    scored = scored_rows(modality, segment)
    mask = dense_mask(modality, segment, "causal", RuleOptions())
    if name == "image sees the next turn's question":
        mask[0, 1:5, 10:13] = True
        mask[0, 1:5, 5:7] = True
    else:
        # eq. 6 taken literally over the whole sequence
        other = (modality[0][:, None] == IMAGE) != (modality[0][None, :] == IMAGE)
        mask[0] |= other
    return modality, segment, scored, mask


@pytest.mark.parametrize(
    "name", ["caption under mma", "image sees the next turn's question", "eq. 6 across a response"]
)
def test_illegal_layouts_are_refused_and_do_leak(name: str) -> None:
    modality, segment, scored, mask = illegal(name)
    with pytest.raises(LeakError, match="leaks in row 0"):
        assert_no_leak(edges_of(mask[0]).numpy(), torch.arange(modality.shape[1]).numpy(), scored.numpy(), rule="mma")
    assert influence(2, scored, segment, lambda q, k, v: attend_masked(q, k, v, mask[:, None])) > 1e-4


def test_a_leak_over_two_hops_is_invisible_to_one_layer() -> None:
    _, segment, scored, mask = illegal("image sees the next turn's question")
    assert influence(1, scored, segment, lambda q, k, v: attend_masked(q, k, v, mask[:, None])) == 0.0
    assert influence(2, scored, segment, lambda q, k, v: attend_masked(q, k, v, mask[:, None])) > 1e-4


def test_the_error_names_row_column_and_the_scored_token_between_them() -> None:
    modality, segment, scored, _ = illegal("caption under mma")
    modality, segment, scored = (x.repeat(3, 1) for x in (modality, segment, scored))
    scored[0] = scored[2] = False
    with pytest.raises(LeakError, match=r"row 1 of the batch: token 1 sees the later token 9, and token 4 between"):
        AttentionMask.build(modality, segment, rule="mma", scored=scored)
    for rule in ("mma_general",):
        with pytest.raises(LeakError, match="causal"):
            AttentionMask.build(modality, segment, rule=rule, scored=scored)
    for rule in ("causal", "mixed", "cca"):
        AttentionMask.build(modality, segment, rule=rule, scored=scored)


@pytest.mark.parametrize("rule", ["mma", "mma_general", "mixed", "cca"])
@pytest.mark.parametrize("name", LEGAL)
def test_one_scored_token_anywhere_is_refused_just_where_an_edge_passes_over_it(name: str, rule: str) -> None:
    modality, segment = rectangle(LEGAL[name])
    edges = edges_of(dense_mask(modality, segment, rule, RuleOptions())[0]).tolist()
    for t in range(modality.shape[1]):
        scored = torch.zeros(modality.shape, dtype=torch.bool)
        scored[0, t] = True
        try:
            AttentionMask.build(modality, segment, rule=rule, scored=scored)
            refused = False
        except LeakError:
            refused = True
        assert refused == any(i <= t < j for i, j in edges)


@SOME
@given(ids_of_rows(holes=False, most_rows=1), st.sampled_from(["mma", "mma_general", "mixed", "cca"]), st.data())
def test_certificate_is_the_condition_on_edges_and_the_leak_of_two_layers(
    ids: tuple[Tensor, Tensor], rule: str, data: st.DataObject
) -> None:
    assume(rule != "cca" or square_images(*ids))
    live = (ids[0] != PAD).nonzero()[:, 1].tolist()
    assume(0 < len(live) <= 40)
    scored = torch.zeros(ids[0].shape, dtype=torch.bool)
    scored[0, data.draw(st.lists(st.sampled_from(live), max_size=3))] = True
    mask = dense_mask(*ids, rule, RuleOptions())
    leaks = any(scored[0, i:j].any() for i, j in edges_of(mask[0]).tolist())
    try:
        AttentionMask.build(*ids, rule=rule, scored=scored)
        refused = False
    except LeakError:
        refused = True
    assert refused == leaks
    measured = influence(2, scored, ids[1], lambda q, k, v: attend_masked(q, k, v, mask[:, None]))
    assert (measured > 0) == leaks
