"""Kernels against dense attention: forward and backward, all rules, float64 down to bfloat16, and bit identity."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_samples import (
    CAUSAL,
    CONFIGS,
    IMAGE,
    MMA,
    PAD,
    RESPONSE,
    RULES,
    TEXT,
    ReferenceVarlen,
    attend_by_mask,
    batch_of,
    build_mask,
    conversation,
    error,
    ids_of,
    random_ids,
    square_images,
    tensors,
    with_gradients,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aki_megatron.attention import AttentionMask, KernelError, attend
from aki_megatron.attention.cpu_kernel import attend_masked, attend_merged
from aki_megatron.attention.cpu_plan import plan_merged
from aki_megatron.attention.dense import attend_dense
from aki_megatron.attention.kernels import MASKED_LENGTH, choose_kernel
from aki_megatron.attention.varlen_kernel import attend_varlen, run_varlen
from aki_megatron.attention.varlen_plan import plan_varlen
from aki_megatron.config.attention import ATTENTION_RULES, AttentionConfig

MANY = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
SOME = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
ANY_IDS = st.one_of(random_ids(holes=False), random_ids(holes=True))
CPU_KERNELS = [attend_merged, attend_masked]
EVERY_KERNEL = [*CPU_KERNELS, attend_dense]


def run(kernel: Callable[..., Tensor], mask: AttentionMask, inputs: list[Tensor]) -> list[Tensor]:
    """Output, dq, dk, dv of a kernel."""
    return with_gradients(lambda q, k, v: kernel(q, k, v, mask), *inputs)


def head_major(inputs: list[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in inputs]


@MANY
@given(ANY_IDS, st.sampled_from(RULES), st.sampled_from(CPU_KERNELS), st.booleans(), st.integers(0, 9))
def test_kernels_equal_attention_by_mask_in_float64(
    ids: tuple[Tensor, Tensor], rule: str, kernel: Callable[..., Tensor], heads_first: bool, seed: int
) -> None:
    if ATTENTION_RULES[rule].square_images and not square_images(*ids):
        rule = "mma"
    mask = build_mask(ids, CONFIGS[rule])
    inputs = tensors(*mask.shape, (4, 2, 8), torch.float64, seed)
    inputs = head_major(inputs) if heads_first else inputs
    scale = float(inputs[3].norm())
    got = run(kernel, mask, inputs)
    wanted = with_gradients(lambda q, k, v: attend_by_mask(q, k, v, mask.dense()), *inputs)
    for ours, reference in zip(got, wanted, strict=True):
        assert error(ours, reference, scale) < 1e-12
    empty = ~mask.dense().any(-1)
    assert not got[0].transpose(1, 2)[empty].any()
    assert not got[1].transpose(1, 2)[empty].any()


@SOME
@given(ANY_IDS, st.sampled_from(RULES))
def test_dense_attention_by_the_reference_formulas_equals_attention_by_mask(
    ids: tuple[Tensor, Tensor], rule: str
) -> None:
    if ATTENTION_RULES[rule].square_images and not square_images(*ids):
        rule = "mixed"
    mask = build_mask(ids, CONFIGS[rule])
    inputs = tensors(*mask.shape, (4, 2, 8), torch.float64)
    wanted = with_gradients(lambda q, k, v: attend_by_mask(q, k, v, mask.dense()), *inputs)
    for got, plain in zip(run(attend_dense, mask, inputs), wanted, strict=True):
        assert error(got, plain, float(inputs[3].norm())) < 1e-12


@SOME
@given(ANY_IDS, st.sampled_from(RULES), st.booleans(), st.integers(0, 9))
def test_varlen_plans_equal_dense_attention(ids: tuple[Tensor, Tensor], rule: str, merged: bool, seed: int) -> None:
    if ATTENTION_RULES[rule].square_images and not square_images(*ids):
        rule = "mma_general"
    mask = build_mask(ids, CONFIGS[rule])
    inputs = tensors(*mask.shape, (4, 2, 8), torch.float64, seed)
    plan = plan_varlen(mask.blocks, torch.device("cpu"), merged=merged)
    got = with_gradients(lambda q, k, v: run_varlen(q, k, v, plan, ReferenceVarlen()), *inputs)
    wanted = with_gradients(lambda q, k, v: attend_by_mask(q, k, v, mask.dense()), *inputs)
    for ours, reference in zip(got, wanted, strict=True):
        assert error(ours, reference, float(inputs[3].norm())) < 1e-12


def test_varlen_gathers_one_turn_and_merges_many() -> None:
    def plan(*sequences: list[list[int]], attention: AttentionConfig = MMA) -> object:
        return plan_varlen(build_mask(batch_of(*sequences), attention).blocks, torch.device("cpu"))

    turn = ids_of((TEXT, 12), (IMAGE, 144), (TEXT, 100), (RESPONSE, 400))
    one = plan([turn], [turn])
    assert (one.merged, len(one.calls)) == (False, 1)
    many = plan([ids_of((TEXT, 4), *[(IMAGE, 16), (TEXT, 8), (RESPONSE, 30)] * 6)])
    assert (many.merged, len(many.calls)) == (True, 2)
    causal = plan([turn, turn], attention=CAUSAL)
    assert (causal.merged, len(causal.calls)) == (False, 1)
    assert causal.calls[0].queries is None
    assert causal.calls[0].keys is None
    assert causal.calls[0].cu_queries.tolist() == [0, 656, 1312]


def realistic(case: str) -> tuple[Tensor, Tensor]:
    """Ids as real batches have them, about 200 tokens long."""
    rng = random.Random(case)
    if case == "uniform":
        return batch_of(*[[ids_of((TEXT, 5), (IMAGE, 64), (TEXT, 40), (RESPONSE, 90))]] * 4)
    if case == "ragged":
        return batch_of(*[[conversation(rng, 1, 64, 60)] for _ in range(6)], length=200)
    if case == "turns":
        return batch_of(*[[conversation(rng, 4, 64, 20)] for _ in range(4)])
    return batch_of(*[[conversation(rng, rng.randint(1, 3), 16, 12) for _ in range(5)] for _ in range(2)])


CASES = ("uniform", "ragged", "turns", "packed")


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_float32_and_bfloat16_are_as_good_as_dense_attention(
    case: str, rule: str, kernel: Callable[..., Tensor]
) -> None:
    mask = build_mask(realistic(case), CONFIGS[rule])
    truth = tensors(*mask.shape, (4, 2, 96), torch.float64)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, None)):
        inputs = [x.to(dtype) for x in truth]
        exact = run(attend_dense, mask, [x.double() for x in inputs])
        ours = run(kernel, mask, inputs)
        dense = run(attend_dense, mask, inputs)
        for got, plain, wanted in zip(ours, dense, exact, strict=True):
            assert error(got, wanted) <= (limit if limit else 1.3 * error(plain, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rule", "options", "runs"),
    [
        ("causal", {}, ((TEXT, 3), (IMAGE, 9), (TEXT, 7), (RESPONSE, 20))),
        ("mma", {"visible_fraction": 0.0}, ((TEXT, 3), (IMAGE, 9), (TEXT, 7), (RESPONSE, 20))),
        ("mma", {}, ((TEXT, 3), (IMAGE, 9), (RESPONSE, 20))),
        ("mma_general", {}, ((TEXT, 30), (RESPONSE, 5))),
        ("cca", {}, ((TEXT, 3), (RESPONSE, 12))),
    ],
)
def test_without_look_ahead_it_is_causal_flash_bit_for_bit(
    rule: str, options: dict[str, float], runs: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    ids = batch_of([ids_of(*runs)], [ids_of(*runs)[:20]], [ids_of(*runs)[:1]], length=300)
    mask = build_mask(ids, AttentionConfig(rule=rule, **options))
    assert not mask.has_look_ahead
    assert choose_kernel(mask, torch.device("cpu"), torch.float32) is attend_merged
    valid = ids[1] >= 0
    q, k, v, grad = tensors(*mask.shape, (4, 2, 16), dtype)
    grad = grad * valid[:, None, :, None]
    ours = with_gradients(lambda q, k, v: attend(q, k, v, mask), q, k, v, grad)
    plain = with_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), q, k, v, grad
    )
    for got, wanted in zip(ours, plain, strict=True):
        assert torch.equal(got.transpose(1, 2)[valid], wanted.transpose(1, 2)[valid])
    assert not ours[0].transpose(1, 2)[~valid].any()


def test_packed_segments_are_causal_flash_of_each_segment_bit_for_bit() -> None:
    sizes = (20, 7, 20, 20, 300, 7)
    ids = batch_of([ids_of((TEXT, size)) for size in sizes], length=380)
    mask = build_mask(ids, MMA)
    inputs = tensors(*mask.shape, (4, 2, 16), torch.float32)
    ours = with_gradients(lambda q, k, v: attend(q, k, v, mask), *inputs)
    start = 0
    for size in sizes:
        part = [x[:, :, start : start + size] for x in inputs]
        plain = with_gradients(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), *part
        )
        for got, wanted in zip(ours, plain, strict=True):
            assert torch.equal(got[:, :, start : start + size], wanted)
        start += size


def test_text_queries_of_mma_are_causal_flash_bit_for_bit_where_calls_are_merged() -> None:
    ids = batch_of([ids_of((TEXT, 5), (IMAGE, 64), (TEXT, 40), (RESPONSE, 491))], [ids_of((TEXT, 80))])
    mask = build_mask(ids, MMA)
    q, k, v, _ = tensors(*mask.shape, (4, 4, 16), torch.float32)
    assert mask.shape[1] > MASKED_LENGTH
    ours, plain = attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    text = (ids[0] != IMAGE) & (ids[1] >= 0)
    assert torch.equal(ours.transpose(1, 2)[text], plain.transpose(1, 2)[text])
    assert not torch.equal(ours.transpose(1, 2)[ids[0] == IMAGE], plain.transpose(1, 2)[ids[0] == IMAGE])


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
def test_gradients_of_padding_are_zero_whatever_comes_back_to_it(kernel: Callable[..., Tensor]) -> None:
    ids = batch_of([ids_of((TEXT, 3), (IMAGE, 4), (TEXT, 5), (RESPONSE, 3))], [ids_of((TEXT, 2))], [[]])
    mask = build_mask(ids, MMA)
    for result in run(kernel, mask, tensors(*mask.shape, (2, 2, 8), torch.float32)):
        assert not result.transpose(1, 2)[ids[1] < 0].any()


def test_attend_chooses_the_fastest_kernel() -> None:
    sample = ids_of((TEXT, 4), (IMAGE, 16), (TEXT, 8), (RESPONSE, 12))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    one = build_mask(batch_of([sample]), MMA)
    assert choose_kernel(build_mask(batch_of([sample], [sample[:30]], [[]]), MMA), cpu, torch.float32) is attend_masked
    assert choose_kernel(build_mask(batch_of([sample, sample]), MMA), cpu, torch.float32) is attend_merged
    assert choose_kernel(build_mask(batch_of([sample]), CAUSAL), cpu, torch.float32) is attend_merged
    long = build_mask(batch_of([sample], length=MASKED_LENGTH + 1), MMA)
    assert choose_kernel(long, cpu, torch.float32) is attend_merged
    assert choose_kernel(one, cuda, torch.bfloat16) is attend_varlen
    assert choose_kernel(one, cuda, torch.float32) is attend_dense


def num_calls(ids: tuple[Tensor, Tensor]) -> int:
    """Flash calls of one forward pass under mma."""
    plan = plan_merged(build_mask(ids, MMA).blocks)
    return plan.one_base + len(plan.base) + len(plan.extra)


def test_small_blocks_share_calls() -> None:
    rng = random.Random(0)
    assert num_calls(batch_of(*[[conversation(rng, 1, 16, 20)] for _ in range(32)])) < 8
    assert num_calls(batch_of([ids_of((TEXT, 4), (IMAGE, 16), (TEXT, 8), (RESPONSE, 12))] * 50)) == 2
    assert num_calls(batch_of(*[[ids_of((TEXT, 4), (IMAGE, 144), (TEXT, 100), (RESPONSE, 12))]] * 8)) == 2


@pytest.mark.parametrize(
    ("device", "dtype", "heads", "message"),
    [
        ("meta", torch.float32, (4, 4), "rule 'mma' on meta.*cpu and cuda only"),
        ("cpu", torch.int32, (4, 4), "rule 'mma' on cpu.*torch.int32.*torch.bfloat16"),
        ("cpu", torch.float32, (4, 3), "rule 'mma' on cpu.*divisor"),
    ],
)
def test_what_no_kernel_can_run_is_an_error_that_names_it(
    device: str, dtype: torch.dtype, heads: tuple[int, int], message: str
) -> None:
    mask = build_mask(batch_of([ids_of((TEXT, 2), (IMAGE, 4), (TEXT, 2))]), MMA)
    q, k = (torch.zeros(1, count, 8, 8, dtype=dtype, device=device) for count in heads)
    with pytest.raises(KernelError, match=message):
        attend(q, k, k, mask)
    with pytest.raises(KernelError, match="mask of 1 sequences and 8 positions"):
        attend(*[torch.zeros(1, 2, 9, 8)] * 3, mask)
    if device == "cpu" and dtype == torch.float32:
        with pytest.raises(KernelError, match=r"torch.float32, torch.float64, torch.float64"):
            attend(torch.zeros(1, 4, 8, 8), *[torch.zeros(1, 4, 8, 8, dtype=torch.float64)] * 2, mask)


def test_a_wrong_mask_is_far_outside_the_limits() -> None:
    """Negative control: a causal mask, one lost id and a shifted assistant marker exceed the limits."""
    ids = ids_of((TEXT, 5), (IMAGE, 16), (TEXT, 12), (RESPONSE, 15))
    right = build_mask(batch_of([ids]), MMA)
    inputs = tensors(*right.shape, (4, 2, 16), torch.float64)
    truth = run(attend_dense, right, inputs)
    lost, shifted, padded = list(ids), list(ids), list(ids)
    lost[12], shifted[32], padded[30] = TEXT, RESPONSE, PAD
    wrong = {
        "causal": build_mask(batch_of([ids]), CAUSAL),
        "lost image id": build_mask(batch_of([lost]), MMA),
        "shifted assistant marker": build_mask(batch_of([shifted]), MMA),
        "padding inside": build_mask(batch_of([padded]), MMA),
    }
    for name, mask in wrong.items():
        assert mask.digest != right.digest, name
        results = run(attend_merged, mask, inputs)
        assert max(error(got, wanted) for got, wanted in zip(results, truth, strict=True)) > 1e-3, name
