"""No leak: what a model predicts never depends on later tokens. By leak check, by Jacobian, and bit for bit."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from attention_samples import (
    CAUSAL,
    CONFIGS,
    IMAGE,
    LOOK_AHEAD,
    MMA,
    PAD,
    RESPONSE,
    RULES,
    TEXT,
    attend_by_mask,
    batch_of,
    ids_of,
    random_ids,
    square_images,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aki_megatron.attention import AttentionMask, LeakError
from aki_megatron.attention.cpu_kernel import attend_masked, attend_merged
from aki_megatron.attention.leak_check import assert_no_leak
from aki_megatron.attention.reference_mask import reference_mask
from aki_megatron.config.attention import ATTENTION_RULES

SOME = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Transformer(nn.Module):
    """A small transformer in float64 whose only mixing of tokens is the attention given; 4 heads over 2 key heads."""

    def __init__(self, num_layers: int, hidden_size: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projections = nn.ModuleList(
            nn.Linear(hidden_size, 2 * hidden_size, dtype=torch.float64) for _ in range(num_layers)
        )
        self.mixers = nn.ModuleList(nn.Linear(hidden_size, hidden_size, dtype=torch.float64) for _ in range(num_layers))

    def forward(self, hidden: Tensor, attention: Attention) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        for project, mix in zip(self.projections, self.mixers, strict=True):
            heads = project(hidden).unflatten(-1, (8, 4)).transpose(1, 2) * 2.0
            seen = attention(*heads.split((4, 2, 2), dim=1)).transpose(1, 2).flatten(2)
            hidden = hidden + torch.tanh(mix(seen))
        return hidden


def influence(num_layers: int, supervised: Tensor, segment_ids: Tensor, attention: Attention) -> float:
    """Largest |d hidden[t] / d input[j]| over supervised positions t and later tokens j."""
    torch.manual_seed(1)
    hidden = torch.randn(*supervised.shape, 16, dtype=torch.float64, requires_grad=True)
    out = Transformer(num_layers)(hidden, attention)
    largest = 0.0
    for b, t in supervised.nonzero().tolist():
        (gradient,) = torch.autograd.grad(
            (out[b, t] * torch.randn(16, dtype=torch.float64)).sum(), hidden, retain_graph=True
        )
        assert gradient[b, : t + 1].abs().max() > 0
        assert not gradient[:b].any()
        assert not gradient[b + 1 :].any()
        assert not gradient[b][segment_ids[b] != segment_ids[b, t]].any()
        largest = max(largest, float(gradient[b, t + 1 :].abs().max()) if t + 1 < supervised.shape[1] else 0.0)
    return largest


LEGAL = {
    "one turn": [ids_of((TEXT, 2), (IMAGE, 4), (TEXT, 3), (RESPONSE, 3))],
    "text before image": [ids_of((TEXT, 4), (IMAGE, 4), (TEXT, 1), (RESPONSE, 3))],
    "caption": [ids_of((TEXT, 1), (IMAGE, 4), (RESPONSE, 5))],
    "three turns, two images": [
        ids_of(
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
    "packed": [ids_of((IMAGE, 4), (TEXT, 2), (RESPONSE, 2)), ids_of((TEXT, 1), (IMAGE, 4), (TEXT, 2), (RESPONSE, 3))],
}


def supervised_positions(modality: Tensor, segment: Tensor) -> Tensor:
    """Positions whose next token is a response of the same segment."""
    supervised = torch.zeros(modality.shape, dtype=torch.bool)
    supervised[:, :-1] = (modality[:, 1:] == RESPONSE) & (segment[:, 1:] == segment[:, :-1])
    return supervised


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LEGAL)
def test_legal_masks_have_exactly_no_influence_from_later_tokens(name: str, rule: str) -> None:
    modality, segment = batch_of(LEGAL[name], [ids_of((TEXT, 3), (RESPONSE, 2))])
    supervised = supervised_positions(modality, segment)
    mask = AttentionMask.build(modality, segment, CONFIGS[rule], supervised=supervised)
    for num_layers in (2, 3):
        for kernel in (attend_merged, attend_masked):
            assert influence(num_layers, supervised, segment, partial(kernel, mask=mask)) == 0.0


@pytest.mark.parametrize("rule", LOOK_AHEAD)
def test_changing_the_answer_changes_no_bit_before_it(rule: str) -> None:
    modality, segment = batch_of(LEGAL["three turns, two images"])
    supervised = supervised_positions(modality, segment)
    mask = AttentionMask.build(modality, segment, CONFIGS[rule], supervised=supervised)
    model, hidden = Transformer(3), torch.randn(*supervised.shape, 16, dtype=torch.float64)

    def run(hidden: Tensor) -> Tensor:
        return model(hidden, lambda q, k, v: attend_merged(q, k, v, mask))

    before = run(hidden)
    for t in supervised[0].nonzero().flatten().tolist():
        changed = hidden.clone()
        changed[0, t + 1 :] = torch.randn(len(hidden[0]) - t - 1, 16, dtype=torch.float64)
        after = run(changed)
        assert torch.equal(after[0, : t + 1][supervised[0, : t + 1]], before[0, : t + 1][supervised[0, : t + 1]])
        assert not torch.equal(after, before)


def edges_of(mask: Tensor) -> Tensor:
    """Every look-ahead edge (query, key) of one mask [T, T]."""
    return mask.triu(1).nonzero()


def illegal(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Modality, segment and supervised of a mask that leaks, and its mask [1, T, T]."""
    if name == "caption under mma":
        # a caption whose text was not marked as RESPONSE: the image reads what is to be predicted
        modality, segment = batch_of([ids_of((TEXT, 1), (IMAGE, 4), (TEXT, 5))])
        supervised = torch.zeros(modality.shape, dtype=torch.bool)
        supervised[0, 4:9] = True
        return modality, segment, supervised, reference_mask(modality, segment, MMA)
    two_turns = ids_of((TEXT, 1), (IMAGE, 4), (TEXT, 2), (RESPONSE, 3), (TEXT, 3), (RESPONSE, 2))
    modality, segment = batch_of([two_turns])
    supervised = supervised_positions(modality, segment)
    mask = reference_mask(modality, segment, CAUSAL)
    if name == "image sees the next turn's question":
        mask[0, 1:5, 10:13] = True
        mask[0, 1:5, 5:7] = True
    else:
        # eq. 6 taken literally over the whole sequence
        other = (modality[0][:, None] == IMAGE) != (modality[0][None, :] == IMAGE)
        mask[0] |= other
    return modality, segment, supervised, mask


@pytest.mark.parametrize(
    "name", ["caption under mma", "image sees the next turn's question", "eq. 6 across a response"]
)
def test_illegal_masks_are_refused_and_do_leak(name: str) -> None:
    modality, segment, supervised, mask = illegal(name)
    with pytest.raises(LeakError, match="leaks in sequence 0"):
        assert_no_leak(
            edges_of(mask[0]).numpy(), torch.arange(modality.shape[1]).numpy(), supervised.numpy(), rule="mma"
        )
    assert influence(2, supervised, segment, lambda q, k, v: attend_by_mask(q, k, v, mask)) > 1e-4


def test_a_leak_over_two_hops_is_invisible_to_one_layer() -> None:
    _, segment, supervised, mask = illegal("image sees the next turn's question")
    assert influence(1, supervised, segment, lambda q, k, v: attend_by_mask(q, k, v, mask)) == 0.0
    assert influence(2, supervised, segment, lambda q, k, v: attend_by_mask(q, k, v, mask)) > 1e-4


def test_the_error_names_sequence_query_key_and_the_supervised_token_between_them() -> None:
    modality, segment, supervised, _ = illegal("caption under mma")
    modality, segment, supervised = (x.repeat(3, 1) for x in (modality, segment, supervised))
    supervised[0] = supervised[2] = False
    with pytest.raises(LeakError, match="sequence 1 of the batch: token 1 sees the later token 9, and token 4 between"):
        AttentionMask.build(modality, segment, MMA, supervised=supervised)
    for rule, attention in CONFIGS.items():
        if ATTENTION_RULES[rule].needs_prompt_after_image:
            with pytest.raises(LeakError, match="causal"):
                AttentionMask.build(modality, segment, attention, supervised=supervised)
        else:
            AttentionMask.build(modality, segment, attention, supervised=supervised)


@pytest.mark.parametrize("rule", LOOK_AHEAD)
@pytest.mark.parametrize("name", LEGAL)
def test_one_supervised_token_anywhere_is_refused_just_where_an_edge_passes_over_it(name: str, rule: str) -> None:
    modality, segment = batch_of(LEGAL[name])
    edges = edges_of(reference_mask(modality, segment, CONFIGS[rule])[0]).tolist()
    for t in range(modality.shape[1]):
        supervised = torch.zeros(modality.shape, dtype=torch.bool)
        supervised[0, t] = True
        try:
            AttentionMask.build(modality, segment, CONFIGS[rule], supervised=supervised)
            refused = False
        except LeakError:
            refused = True
        assert refused == any(i <= t < j for i, j in edges)


@SOME
@given(random_ids(holes=False, max_sequences=1), st.sampled_from(LOOK_AHEAD), st.data())
def test_the_leak_check_is_the_condition_on_edges_and_the_leak_of_two_layers(
    ids: tuple[Tensor, Tensor], rule: str, data: st.DataObject
) -> None:
    assume(not ATTENTION_RULES[rule].square_images or square_images(*ids))
    valid = (ids[0] != PAD).nonzero()[:, 1].tolist()
    assume(0 < len(valid) <= 40)
    supervised = torch.zeros(ids[0].shape, dtype=torch.bool)
    supervised[0, data.draw(st.lists(st.sampled_from(valid), max_size=3))] = True
    mask = reference_mask(*ids, CONFIGS[rule])
    leaks = any(supervised[0, i:j].any() for i, j in edges_of(mask[0]).tolist())
    try:
        AttentionMask.build(*ids, CONFIGS[rule], supervised=supervised)
        refused = False
    except LeakError:
        refused = True
    assert refused == leaks
    measured = influence(2, supervised, ids[1], lambda q, k, v: attend_by_mask(q, k, v, mask))
    assert (measured > 0) == leaks
