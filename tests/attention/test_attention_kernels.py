"""Kernels against dense attention: forward and backward, all rules, float64 down to bfloat16, and bit identity."""

import random

import pytest
import torch
import torch.nn.functional as F
from attention_samples import (
    IMAGE,
    PAD,
    RESPONSE,
    RULES,
    TEXT,
    ReferenceVarlen,
    conversation,
    error,
    ids_of_rows,
    nobody,
    rectangle,
    row_of,
    square_images,
    tensors,
    with_gradients,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aki_megatron.attention import AttentionMask, BackendError, attend
from aki_megatron.attention.cpu_plan import plan_calls
from aki_megatron.attention.dense import attend_masked
from aki_megatron.attention.kernels import MASKED_WIDTH, choose
from aki_megatron.attention.varlen import run_varlen
from aki_megatron.attention.varlen_plan import plan_varlen

MANY = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
SOME = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
ANY_IDS = st.one_of(ids_of_rows(holes=False), ids_of_rows(holes=True))


def built(ids: tuple[Tensor, Tensor], rule: str, **options: object) -> AttentionMask:
    return AttentionMask.build(*ids, rule=rule, scored=nobody(ids[0]), **options)


def head_major(inputs: list[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in inputs]


@MANY
@given(ANY_IDS, st.sampled_from(RULES), st.sampled_from(["cpu", "masked"]), st.booleans(), st.integers(0, 9))
def test_kernels_equal_dense_attention_in_float64(
    ids: tuple[Tensor, Tensor], rule: str, backend: str, heads_first: bool, seed: int
) -> None:
    if rule == "cca" and not square_images(*ids):
        rule = "mma"
    layout = built(ids, rule)
    inputs = tensors(*layout.shape, (4, 2, 8), torch.float64, seed)
    inputs = head_major(inputs) if heads_first else inputs
    scale = float(inputs[3].norm())
    got = with_gradients(lambda q, k, v: attend(q, k, v, layout, backend=backend), *inputs)
    wanted = with_gradients(lambda q, k, v: attend_masked(q, k, v, layout.dense()[:, None]), *inputs)
    for ours, theirs in zip(got, wanted, strict=True):
        assert error(ours, theirs, scale) < 1e-12
    sees_nothing = ~layout.dense().any(-1)
    assert not got[0].transpose(1, 2)[sees_nothing].any()
    assert not got[1].transpose(1, 2)[sees_nothing].any()


@SOME
@given(ANY_IDS, st.sampled_from(RULES), st.booleans(), st.integers(0, 9))
def test_varlen_plans_equal_dense_attention(ids: tuple[Tensor, Tensor], rule: str, merged: bool, seed: int) -> None:
    if rule == "cca" and not square_images(*ids):
        rule = "mma_general"
    layout = built(ids, rule)
    inputs = tensors(*layout.shape, (4, 2, 8), torch.float64, seed)
    plan = plan_varlen(layout.pieces, torch.device("cpu"), merged=merged)
    got = with_gradients(lambda q, k, v: run_varlen(q, k, v, plan, ReferenceVarlen()), *inputs)
    wanted = with_gradients(lambda q, k, v: attend_masked(q, k, v, layout.dense()[:, None]), *inputs)
    for ours, theirs in zip(got, wanted, strict=True):
        assert error(ours, theirs, float(inputs[3].norm())) < 1e-12


def test_varlen_gathers_one_turn_and_merges_many() -> None:
    def plan(*rows: list[list[int]], rule: str = "mma") -> object:
        return plan_varlen(built(rectangle(*rows), rule).pieces, torch.device("cpu"))

    turn = row_of((TEXT, 12), (IMAGE, 144), (TEXT, 100), (RESPONSE, 400))
    one = plan([turn], [turn])
    assert (one.merged, len(one.calls)) == (False, 1)
    many = plan([row_of((TEXT, 4), *[(IMAGE, 16), (TEXT, 8), (RESPONSE, 30)] * 6)])
    assert (many.merged, len(many.calls)) == (True, 2)
    causal = plan([turn, turn], rule="causal")
    assert (causal.merged, len(causal.calls)) == (False, 1)
    assert causal.calls[0].rows is None
    assert causal.calls[0].columns is None
    assert causal.calls[0].cu_rows.tolist() == [0, 656, 1312]


def realistic(case: str) -> tuple[Tensor, Tensor]:
    """Ids as real batches have them, about 200 tokens wide."""
    rng = random.Random(case)
    if case == "uniform":
        return rectangle(*[[row_of((TEXT, 5), (IMAGE, 64), (TEXT, 40), (RESPONSE, 90))]] * 4)
    if case == "ragged":
        return rectangle(*[[conversation(rng, 1, 64, 60)] for _ in range(6)], width=200)
    if case == "turns":
        return rectangle(*[[conversation(rng, 4, 64, 20)] for _ in range(4)])
    return rectangle(*[[conversation(rng, rng.randint(1, 3), 16, 12) for _ in range(5)] for _ in range(2)])


CASES = ("uniform", "ragged", "turns", "packed")


@pytest.mark.parametrize("backend", ["cpu", "masked"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_float32_and_bfloat16_are_as_good_as_dense_attention(case: str, rule: str, backend: str) -> None:
    layout = built(realistic(case), rule)
    truth = tensors(*layout.shape, (4, 2, 96), torch.float64)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, None)):
        inputs = [x.to(dtype) for x in truth]
        exact = with_gradients(lambda q, k, v: attend(q, k, v, layout, backend="dense"), *[x.double() for x in inputs])
        ours = with_gradients(lambda q, k, v: attend(q, k, v, layout, backend=backend), *inputs)
        dense = with_gradients(lambda q, k, v: attend(q, k, v, layout, backend="dense"), *inputs)
        for got, plain, wanted in zip(ours, dense, exact, strict=True):
            assert error(got, wanted) <= (limit if limit else 1.3 * error(plain, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rule", "options", "row"),
    [
        ("causal", {}, ((TEXT, 3), (IMAGE, 9), (TEXT, 7), (RESPONSE, 20))),
        ("mma", {"visible_fraction": 0.0}, ((TEXT, 3), (IMAGE, 9), (TEXT, 7), (RESPONSE, 20))),
        ("mma", {}, ((TEXT, 3), (IMAGE, 9), (RESPONSE, 20))),
        ("mma_general", {}, ((TEXT, 30), (RESPONSE, 5))),
        ("cca", {}, ((TEXT, 3), (RESPONSE, 12))),
    ],
)
def test_without_look_ahead_it_is_causal_flash_bit_for_bit(
    rule: str, options: dict[str, float], row: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    ids = rectangle([row_of(*row)], [row_of(*row)[:20]], [row_of(*row)[:1]], width=300)
    layout = built(ids, rule, **options)
    assert not layout.has_look_ahead
    assert choose(layout, torch.device("cpu"), torch.float32) == "cpu"
    real = ids[1] >= 0
    q, k, v, grad = tensors(*layout.shape, (4, 2, 16), dtype)
    grad = grad * real[:, None, :, None]
    ours = with_gradients(lambda q, k, v: attend(q, k, v, layout), q, k, v, grad)
    plain = with_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), q, k, v, grad
    )
    for got, wanted in zip(ours, plain, strict=True):
        assert torch.equal(got.transpose(1, 2)[real], wanted.transpose(1, 2)[real])
    assert not ours[0].transpose(1, 2)[~real].any()


def test_packed_segments_are_causal_flash_of_each_segment_bit_for_bit() -> None:
    sizes = (20, 7, 20, 20, 300, 7)
    ids = rectangle([row_of((TEXT, size)) for size in sizes], width=380)
    layout = built(ids, "mma")
    inputs = tensors(*layout.shape, (4, 2, 16), torch.float32)
    ours = with_gradients(lambda q, k, v: attend(q, k, v, layout), *inputs)
    start = 0
    for size in sizes:
        cut = [x[:, :, start : start + size] for x in inputs]
        plain = with_gradients(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), *cut
        )
        for got, wanted in zip(ours, plain, strict=True):
            assert torch.equal(got[:, :, start : start + size], wanted)
        start += size


def test_text_rows_of_mma_are_causal_flash_bit_for_bit_where_pieces_are_merged() -> None:
    ids = rectangle([row_of((TEXT, 5), (IMAGE, 64), (TEXT, 40), (RESPONSE, 491))], [row_of((TEXT, 80))])
    layout = built(ids, "mma")
    q, k, v, _ = tensors(*layout.shape, (4, 4, 16), torch.float32)
    assert layout.shape[1] > MASKED_WIDTH
    ours, plain = attend(q, k, v, layout), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    rows = (ids[0] != IMAGE) & (ids[1] >= 0)
    assert torch.equal(ours.transpose(1, 2)[rows], plain.transpose(1, 2)[rows])
    assert not torch.equal(ours.transpose(1, 2)[ids[0] == IMAGE], plain.transpose(1, 2)[ids[0] == IMAGE])


def test_gradients_of_padding_are_zero_whatever_comes_back_to_it() -> None:
    ids = rectangle([row_of((TEXT, 3), (IMAGE, 4), (TEXT, 5), (RESPONSE, 3))], [row_of((TEXT, 2))], [[]])
    for backend in ("cpu", "masked", "dense"):
        layout = built(ids, "mma")
        inputs = tensors(*layout.shape, (2, 2, 8), torch.float32)
        for result in with_gradients(lambda q, k, v: attend(q, k, v, layout, backend=backend), *inputs):  # noqa: B023
            assert not result.transpose(1, 2)[ids[1] < 0].any()


def test_auto_takes_the_fastest_kernel_for_a_cpu() -> None:
    sample = row_of((TEXT, 4), (IMAGE, 16), (TEXT, 8), (RESPONSE, 12))
    cpu = torch.device("cpu")
    assert choose(built(rectangle([sample], [sample[:30]], [[]]), "mma"), cpu, torch.float32) == "masked"
    assert choose(built(rectangle([sample, sample]), "mma"), cpu, torch.float32) == "cpu"
    assert choose(built(rectangle([sample]), "causal"), cpu, torch.float32) == "cpu"
    assert choose(built(rectangle([sample], width=MASKED_WIDTH + 1), "mma"), cpu, torch.float32) == "cpu"
    assert choose(built(rectangle([sample]), "mma"), torch.device("cuda"), torch.bfloat16) == "cuda"
    assert choose(built(rectangle([sample]), "mma"), torch.device("cuda"), torch.float32) == "dense"


def test_small_pieces_share_calls() -> None:
    rng = random.Random(0)
    ids = rectangle(*[[conversation(rng, 1, 16, 20)] for _ in range(32)])
    assert plan_calls(built(ids, "mma").pieces).calls < 8
    packed = rectangle([row_of((TEXT, 4), (IMAGE, 16), (TEXT, 8), (RESPONSE, 12))] * 50)
    assert plan_calls(built(packed, "mma").pieces).calls == 2
    uniform = rectangle(*[[row_of((TEXT, 4), (IMAGE, 144), (TEXT, 100), (RESPONSE, 12))]] * 8)
    assert plan_calls(built(uniform, "mma").pieces).calls == 2


@pytest.mark.parametrize(
    ("backend", "dtype", "shape", "says"),
    [
        ("cuda", torch.bfloat16, (4, 4), "'cuda' on cpu with rule 'mma'.*'cpu', 'dense', 'masked'"),
        ("flex", torch.float32, (4, 4), "'flex' on cpu with rule 'mma'"),
        ("fast", torch.float32, (4, 4), "'fast' is unknown for device cpu and rule 'mma'"),
        ("cpu", torch.int32, (4, 4), "'cpu' on cpu with rule 'mma'.*torch.int32"),
        ("auto", torch.float32, (4, 3), "divisor"),
    ],
)
def test_what_a_backend_cannot_do_is_an_error_that_names_it(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], says: str
) -> None:
    layout = built(rectangle([row_of((TEXT, 2), (IMAGE, 4), (TEXT, 2))]), "mma")
    q, k = (torch.zeros(1, heads, 8, 8, dtype=dtype) for heads in shape)
    with pytest.raises(BackendError, match=says):
        attend(q, k, k, layout, backend=backend)
    with pytest.raises(BackendError, match="layout of 1 rows and 8 tokens"):
        attend(*[torch.zeros(1, 2, 9, 8)] * 3, layout)


def test_a_wrong_mask_is_far_outside_the_limits() -> None:
    """The negative twin: a causal mask, one lost id and a shifted assistant marker are seen at once."""
    row = row_of((TEXT, 5), (IMAGE, 16), (TEXT, 12), (RESPONSE, 15))
    right = built(rectangle([row]), "mma")
    inputs = tensors(*right.shape, (4, 2, 16), torch.float64)
    truth = with_gradients(lambda q, k, v: attend(q, k, v, right, backend="dense"), *inputs)
    lost, shifted, padded = list(row), list(row), list(row)
    lost[12], shifted[32], padded[30] = TEXT, RESPONSE, PAD
    wrong = {
        "causal": built(rectangle([row]), "causal"),
        "lost image id": built(rectangle([lost]), "mma"),
        "shifted assistant marker": built(rectangle([shifted]), "mma"),
        "padding inside": built(rectangle([padded]), "mma"),
    }
    for name, layout in wrong.items():
        assert layout.digest != right.digest, name
        results = with_gradients(lambda q, k, v: attend(q, k, v, layout, backend="cpu"), *inputs)  # noqa: B023
        assert max(error(got, wanted) for got, wanted in zip(results, truth, strict=True)) > 1e-3, name
