"""Builders, reference formulas and nested loops give the same masks; digests, errors and build time."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from attention_samples import (
    AUDIO,
    CAUSAL,
    CCA,
    CONFIGS,
    IMAGE,
    MIXED,
    MMA,
    PAD,
    RESPONSE,
    RULES,
    TEXT,
    batch_of,
    build_mask,
    ids_of,
    masks_by_loops,
    random_ids,
    square_images,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aki_megatron.attention import AttentionMask, MaskError
from aki_megatron.attention.reference_mask import MASK_MODS, reference_mask
from aki_megatron.attention.rules import BUILDERS, hash64, rings
from aki_megatron.config.attention import ATTENTION_RULES, AttentionConfig
from aki_megatron.errors import UserError

FEW = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))


def test_builders_reference_formulas_and_registry_name_the_same_rules() -> None:
    assert list(BUILDERS) == list(MASK_MODS) == list(ATTENTION_RULES) == list(CONFIGS)


@MANY
@given(st.one_of(random_ids(holes=False, max_sequences=2), random_ids(holes=True, max_sequences=2)))
def test_builders_formulas_and_loops_agree(ids: tuple[Tensor, Tensor]) -> None:
    for rule, attention in CONFIGS.items():
        if ATTENTION_RULES[rule].square_images and not square_images(*ids):
            continue
        mask, reference = build_mask(ids, attention), reference_mask(*ids, attention)
        assert torch.equal(mask.dense(), reference), rule
        assert torch.equal(reference, masks_by_loops(*ids, rule)), rule
        assert mask.num_pairs == int(reference.sum())
        position = torch.arange(reference.shape[-1])
        assert mask.has_look_ahead == bool((reference & (position[None, :] > position[:, None])).any())


@settings(FEW, max_examples=40)
@given(st.one_of(random_ids(holes=False), random_ids(holes=True)))
def test_rows_of_some_queries_are_lines_of_the_dense_mask(ids: tuple[Tensor, Tensor]) -> None:
    for rule, attention in CONFIGS.items():
        if ATTENTION_RULES[rule].square_images and not square_images(*ids):
            continue
        mask, reference = build_mask(ids, attention), reference_mask(*ids, attention)
        queries = np.arange(reference.shape[-1])[::-2]
        for sequence, lines in enumerate(reference):
            assert torch.equal(mask.rows(sequence, queries), lines[torch.from_numpy(queries.copy())]), rule


@FEW
@given(st.one_of(random_ids(holes=False), random_ids(holes=True)))
def test_look_ahead_stays_where_the_registry_says(ids: tuple[Tensor, Tensor]) -> None:
    modality, segment = ids
    for rule, attention in CONFIGS.items():
        if ATTENTION_RULES[rule].square_images and not square_images(*ids):
            continue
        for b, i, j in build_mask(ids, attention).dense().triu(1).nonzero().tolist():
            assert ATTENTION_RULES[rule].look_ahead != "none", rule
            between = modality[b, i : j + 1][segment[b, i : j + 1] == segment[b, i]]
            if ATTENTION_RULES[rule].look_ahead == "image":
                assert set(between.tolist()) <= {IMAGE, PAD}, rule
            assert RESPONSE not in between, rule


@FEW
@given(random_ids(holes=True), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]), st.sampled_from(["prefix", "suffix"]))
def test_visible_fraction_agrees_with_loops(ids: tuple[Tensor, Tensor], fraction: float, selection: str) -> None:
    def kept(size: int) -> range:
        count = int(fraction * size + 0.5)
        return range(count) if selection == "prefix" else range(size - count, size)

    mask = build_mask(ids, AttentionConfig(rule="mma", visible_fraction=fraction, selection=selection))
    assert torch.equal(mask.dense(), masks_by_loops(*ids, "mma", kept))
    assert torch.equal(mask.dense(), reference_mask(*ids, mask.attention))


@FEW
@given(random_ids(holes=True), st.sampled_from(["prefix", "suffix", "random"]), st.integers(0, 3))
def test_fractions_are_nested_between_causal_and_mma(ids: tuple[Tensor, Tensor], selection: str, seed: int) -> None:
    def mask_of(fraction: float) -> AttentionMask:
        return build_mask(ids, AttentionConfig(rule="mma", visible_fraction=fraction, selection=selection, seed=seed))

    masks = [mask_of(fraction).dense() for fraction in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)]
    for narrow, wide in zip(masks[:-1], masks[1:], strict=True):
        assert not (narrow & ~wide).any()
    assert torch.equal(masks[0], build_mask(ids, CAUSAL).dense())
    assert torch.equal(masks[-1], build_mask(ids, MMA).dense())
    half = mask_of(0.5)
    assert torch.equal(half.dense(), reference_mask(*ids, half.attention))


def test_a_random_selection_depends_on_the_seed_and_not_on_the_position_in_the_batch() -> None:
    sample = ids_of((TEXT, 3), (IMAGE, 4), (TEXT, 40), (RESPONSE, 5))
    alone = batch_of([sample])
    packed = batch_of([ids_of((TEXT, 7), (RESPONSE, 2)), sample], [sample, sample])

    def keys(ids: tuple[Tensor, Tensor], sequence: int, start: int, seed: int) -> list[int]:
        attention = AttentionConfig(rule="mma", visible_fraction=0.3, selection="random", seed=seed)
        mask = build_mask(ids, attention).dense()
        return (mask[sequence, start + 3, start + 7 : start + 47]).nonzero().flatten().tolist()

    first = keys(alone, 0, 0, seed=1)
    assert len(first) == 12
    assert first != list(range(12))
    assert first == keys(packed, 0, 9, seed=1) == keys(packed, 1, 0, seed=1) == keys(packed, 1, 52, seed=1)
    assert first != keys(alone, 0, 0, seed=2)


def test_the_random_numbers_are_the_recorded_ones() -> None:
    turn, rank = np.array([0, 0, 1, 3, 7]), np.array([0, 1, 0, 17, 99])
    assert hash64(0, turn, rank).tolist() == [
        -2152535657050944081,
        7960286522194355700,
        -3074725724160591132,
        -1783192289392261494,
        7606737389607671287,
    ]
    assert hash64(5, turn, rank).tolist() == [
        3031197058119901765,
        4555323420259682235,
        -4839154212157049444,
        -3054558722290081130,
        -6393259870665972413,
    ]


def test_mma_reaches_the_assistant_marker_and_not_the_response() -> None:
    modality, segment = batch_of([ids_of((TEXT, 2), (IMAGE, 4), (TEXT, 3), (RESPONSE, 2))])
    mask = build_mask((modality, segment), MMA).dense()[0]
    assert mask[2].tolist() == [True, True, True, False, False, False, True, True, True, False, False]
    assert mask[7].tolist() == [True] * 8 + [False] * 3


def test_adjacent_images_are_split_by_image_tokens() -> None:
    ids = batch_of([ids_of((TEXT, 1), (IMAGE, 8), (TEXT, 1))])
    mask = build_mask(ids, MIXED, image_tokens=4).dense()[0]
    assert mask[1].tolist() == [True] * 5 + [False] * 5
    assert mask[5].tolist() == [True] * 9 + [False]
    with pytest.raises(MaskError, match="multiple of 3"):
        build_mask(ids, MIXED, image_tokens=3)
    with pytest.raises(MaskError, match="square"):
        build_mask(ids, CCA)
    assert build_mask(ids, CCA, image_tokens=4).num_pairs == int(reference_mask(*ids, CCA, image_tokens=4).sum())


def test_rings_and_concentric_positions_of_the_aki_grid() -> None:
    assert np.bincount(rings(12)).tolist() == [44, 36, 28, 20, 12, 4]
    ids = batch_of([ids_of((TEXT, 5), (IMAGE, 144), (TEXT, 3)), ids_of((TEXT, 2))])
    sequential = torch.arange(154, dtype=torch.int32)[None]
    positions = build_mask(ids, CCA).position_ids(sequential)
    assert positions.dtype == torch.int32
    assert positions[0, :7].tolist() == [0, 1, 2, 3, 4, 5, 5]
    assert positions[0, 5 : 5 + 144].tolist() == (5 + rings(12)).tolist()
    assert positions[0, -5:].tolist() == [11, 12, 13, 0, 1]
    two = build_mask(batch_of([ids_of((TEXT, 1), (IMAGE, 18), (TEXT, 1))]), CCA, image_tokens=9)
    wanted = [0] + [1] * 4 + [2] + [1] * 4 + [3] * 4 + [4] + [3] * 4 + [5]
    assert two.position_ids(sequential[:, :20])[0].tolist() == wanted
    for rule, attention in CONFIGS.items():
        assert (build_mask(ids, attention).position_ids(sequential) is sequential) == (
            ATTENTION_RULES[rule].position_ids == "sequential"
        )


def test_digest_is_equal_for_equal_ids_and_differs_when_any_id_or_option_does() -> None:
    modality, segment = batch_of([ids_of((TEXT, 2), (IMAGE, 4), (TEXT, 3), (RESPONSE, 2))], [ids_of((TEXT, 4))])
    supervised = modality == RESPONSE

    def digest(
        modality: Tensor, segment: Tensor, supervised: Tensor, attention: AttentionConfig = MMA, image_tokens: int = 0
    ) -> str:
        return AttentionMask.build(
            modality, segment, attention, supervised=supervised, image_tokens=image_tokens
        ).digest

    base = digest(modality, segment, supervised)
    assert base == digest(modality.int(), segment.long(), supervised.clone())
    others = [digest(modality, segment, supervised, attention) for rule, attention in CONFIGS.items() if rule != "mma"]
    for options in ({"visible_fraction": 0.5}, {"selection": "suffix"}, {"seed": 1}):
        others.append(digest(modality, segment, supervised, AttentionConfig(rule="mma", **options)))
    others.append(digest(modality, segment, supervised, image_tokens=4))
    others.append(digest(modality, segment, torch.zeros_like(supervised)))
    for i in range(4):
        changed = segment.clone()
        changed[1, i:4] = 1
        others.append(digest(modality, changed, supervised))
    for i in range(11):
        changed = modality.clone()
        changed[0, i] = AUDIO
        others.append(digest(changed, segment, torch.zeros_like(supervised)))
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_tokens": -1}, "number of latents"),
        ({"supervised": torch.zeros(1, 3)}, "bool"),
        ({"supervised": torch.zeros(1, 4, dtype=torch.bool)}, "one shape"),
        ({"segment_ids": torch.tensor([[0, 1, 0]])}, "several parts"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    right = {"modality_ids": torch.ones(1, 3, dtype=torch.int8), "segment_ids": torch.zeros(1, 3, dtype=torch.int32)}
    arguments = {**right, "attention": MMA, "supervised": torch.zeros(1, 3, dtype=torch.bool), **change}
    with pytest.raises(UserError, match=message):
        AttentionMask.build(**arguments)


def test_a_batch_of_padding_only_is_an_empty_mask() -> None:
    modality = torch.full((2, 5), int(PAD), dtype=torch.int8)
    for attention in CONFIGS.values():
        mask = build_mask((modality, torch.full((2, 5), -1, dtype=torch.int32)), attention)
        assert mask.num_pairs == 0
        assert not mask.dense().any()


def fastest(repeats: int, run: Callable[[], object]) -> float:
    """Least seconds of CPU time of a call: other programs on the machine do not count."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times)


@pytest.mark.parametrize("rule", RULES)
def test_building_a_mask_of_32k_packed_tokens_takes_less_than_10_ms(rule: str) -> None:
    sizes = [430 + 13 * (n % 11) for n in range(66)]
    samples = [ids_of((TEXT, 12), (IMAGE, 144), (TEXT, 100), (RESPONSE, size - 256)) for size in sizes]
    ids = batch_of(samples, length=32768)
    assert fastest(5, lambda: build_mask(ids, CONFIGS[rule])) < 0.010


def test_building_a_small_mask_takes_less_than_a_millisecond() -> None:
    sequences = [[ids_of((TEXT, 6), (IMAGE, 9), (TEXT, 10 + n % 9), (RESPONSE, 4 + n % 7))] for n in range(32)]
    ids = batch_of(*sequences, length=60)
    assert fastest(20, lambda: build_mask(ids, MMA)) < 0.001
