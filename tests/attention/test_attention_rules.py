"""Layouts, the dense oracle and nested loops say the same; digests, errors and build time."""

import time

import numpy as np
import pytest
import torch
from attention_samples import (
    AUDIO,
    IMAGE,
    PAD,
    RESPONSE,
    RULES,
    TEXT,
    ids_of_rows,
    loops,
    nobody,
    rectangle,
    row_of,
    square_images,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aki_megatron.attention import AttentionMask, MaskError
from aki_megatron.attention.positions import concentric_positions
from aki_megatron.attention.reference_mask import dense_mask
from aki_megatron.attention.rules import RuleOptions, rings
from aki_megatron.errors import UserError

FEW = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))


def built(modality: Tensor, segment: Tensor, rule: str, **options: object) -> AttentionMask:
    return AttentionMask.build(modality, segment, rule=rule, scored=nobody(modality), **options)


@MANY
@given(st.one_of(ids_of_rows(holes=False, most_rows=2), ids_of_rows(holes=True, most_rows=2)))
def test_layout_oracle_and_loops_agree(ids: tuple[Tensor, Tensor]) -> None:
    for rule in RULES:
        if rule == "cca" and not square_images(*ids):
            continue
        layout, oracle = built(*ids, rule), dense_mask(*ids, rule, RuleOptions())
        assert torch.equal(layout.dense(), oracle), rule
        assert torch.equal(oracle, loops(*ids, rule)), rule
        assert layout.area == int(oracle.sum())
        token = torch.arange(oracle.shape[-1])
        assert layout.has_look_ahead == bool((oracle & (token[None, :] > token[:, None])).any())


@FEW
@given(ids_of_rows(holes=True), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]), st.sampled_from(["prefix", "suffix"]))
def test_visible_fraction_agrees_with_loops(ids: tuple[Tensor, Tensor], fraction: float, selection: str) -> None:
    def kept(size: int) -> range:
        count = int(fraction * size + 0.5)
        return range(count) if selection == "prefix" else range(size - count, size)

    layout = built(*ids, "mma", visible_fraction=fraction, selection=selection)
    assert torch.equal(layout.dense(), loops(*ids, "mma", kept))
    assert torch.equal(layout.dense(), dense_mask(*ids, "mma", layout.options))


@FEW
@given(ids_of_rows(holes=True), st.sampled_from(["prefix", "suffix", "random"]), st.integers(0, 3))
def test_fractions_are_nested_between_causal_and_mma(ids: tuple[Tensor, Tensor], selection: str, seed: int) -> None:
    options = {"selection": selection, "seed": seed}
    masks = [
        built(*ids, "mma", visible_fraction=fraction, **options).dense() for fraction in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)
    ]
    for narrow, wide in zip(masks[:-1], masks[1:], strict=True):
        assert not (narrow & ~wide).any()
    assert torch.equal(masks[0], built(*ids, "causal").dense())
    assert torch.equal(masks[-1], built(*ids, "mma").dense())
    half = built(*ids, "mma", visible_fraction=0.5, **options)
    assert torch.equal(half.dense(), dense_mask(*ids, "mma", half.options))


def test_random_selection_has_the_right_size_follows_the_seed_and_not_the_place_in_the_batch() -> None:
    sample = row_of((TEXT, 3), (IMAGE, 4), (TEXT, 40), (RESPONSE, 5))
    alone = rectangle([sample])
    packed = rectangle([row_of((TEXT, 7), (RESPONSE, 2)), sample], [sample, sample])

    def columns(ids: tuple[Tensor, Tensor], row: int, start: int, seed: int) -> list[int]:
        mask = built(*ids, "mma", visible_fraction=0.3, selection="random", seed=seed).dense()
        return (mask[row, start + 3, start + 7 : start + 47]).nonzero().flatten().tolist()

    first = columns(alone, 0, 0, seed=1)
    assert len(first) == 12
    assert first != list(range(12))
    assert first == columns(packed, 0, 9, seed=1) == columns(packed, 1, 0, seed=1) == columns(packed, 1, 52, seed=1)
    assert first != columns(alone, 0, 0, seed=2)


def test_mma_reaches_the_assistant_marker_and_not_the_response() -> None:
    modality, segment = rectangle([row_of((TEXT, 2), (IMAGE, 4), (TEXT, 3), (RESPONSE, 2))])
    mask = built(modality, segment, "mma").dense()[0]
    assert mask[2].tolist() == [True, True, True, False, False, False, True, True, True, False, False]
    assert mask[7].tolist() == [True] * 8 + [False] * 3


def test_neighbouring_images_are_cut_by_image_tokens() -> None:
    ids = rectangle([row_of((TEXT, 1), (IMAGE, 8), (TEXT, 1))])
    mask = built(*ids, "mixed", image_tokens=4).dense()[0]
    assert mask[1].tolist() == [True] * 5 + [False] * 5
    assert mask[5].tolist() == [True] * 9 + [False]
    with pytest.raises(MaskError, match="multiple of 3"):
        built(*ids, "mixed", image_tokens=3)
    with pytest.raises(MaskError, match="square"):
        built(*ids, "cca")
    assert built(*ids, "cca", image_tokens=4).area == int(dense_mask(*ids, "cca", RuleOptions(image_tokens=4)).sum())


def test_rings_and_concentric_positions_of_the_aki_grid() -> None:
    assert np.bincount(rings(12)).tolist() == [44, 36, 28, 20, 12, 4]
    modality, segment = rectangle([row_of((TEXT, 5), (IMAGE, 144), (TEXT, 3)), row_of((TEXT, 2))])
    positions = concentric_positions(modality, segment)
    assert positions.dtype == torch.int32
    assert positions[0, :7].tolist() == [0, 1, 2, 3, 4, 5, 5]
    assert positions[0, 5 : 5 + 144].tolist() == (5 + rings(12)).tolist()
    assert positions[0, -5:].tolist() == [11, 12, 13, 0, 1]
    two = rectangle([row_of((TEXT, 1), (IMAGE, 18), (TEXT, 1))])
    assert concentric_positions(*two, image_tokens=9)[0].tolist() == [0] + [1] * 4 + [2] + [1] * 4 + [3] * 4 + [4] + [
        3
    ] * 4 + [5]


def test_digest_is_equal_for_equal_ids_and_differs_when_any_id_or_option_does() -> None:
    modality, segment = rectangle([row_of((TEXT, 2), (IMAGE, 4), (TEXT, 3), (RESPONSE, 2))], [row_of((TEXT, 4))])
    scored = modality == RESPONSE

    def digest(modality: Tensor, segment: Tensor, scored: Tensor, rule: str = "mma", **options: object) -> str:
        return AttentionMask.build(modality, segment, rule=rule, scored=scored, **options).digest

    base = digest(modality, segment, scored)
    assert base == digest(modality.int(), segment.long(), scored.clone())
    others = [digest(modality, segment, scored, rule) for rule in RULES if rule != "mma"]
    others.append(digest(modality, segment, scored, visible_fraction=0.5))
    others.append(digest(modality, segment, torch.zeros_like(scored)))
    for i in range(4):
        changed = segment.clone()
        changed[1, i:4] = 1
        others.append(digest(modality, changed, scored))
    for i in range(11):
        changed = modality.clone()
        changed[0, i] = AUDIO
        others.append(digest(changed, segment, torch.zeros_like(scored)))
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rule": "eq5"}, "unknown"),
        ({"visible_fraction": 1.5}, r"\[0, 1\]"),
        ({"visible_fraction": 0.5, "rule": "mixed"}, "'mma' only"),
        ({"selection": "middle"}, "prefix, suffix or random"),
        ({"image_tokens": -1}, "number of latents"),
        ({"scored": torch.zeros(1, 3)}, "bool"),
        ({"scored": torch.zeros(1, 4, dtype=torch.bool)}, "one shape"),
        ({"segment_ids": torch.tensor([[0, 1, 0]])}, "several parts"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], says: str) -> None:
    right = {"modality_ids": torch.ones(1, 3, dtype=torch.int8), "segment_ids": torch.zeros(1, 3, dtype=torch.int32)}
    arguments = {**right, "rule": "mma", "scored": torch.zeros(1, 3, dtype=torch.bool), **change}
    with pytest.raises(UserError, match=says):
        AttentionMask.build(**arguments)


def test_a_batch_of_padding_only_is_an_empty_mask() -> None:
    modality = torch.full((2, 5), int(PAD), dtype=torch.int8)
    for rule in RULES:
        layout = built(modality, torch.full((2, 5), -1, dtype=torch.int32), rule)
        assert layout.area == 0
        assert not layout.dense().any()


def fastest(repeats: int, run: object) -> float:
    """Least seconds of CPU time of a call: other programs on the machine do not count."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times)


@pytest.mark.parametrize("rule", RULES)
def test_building_a_layout_of_32k_packed_tokens_takes_less_than_10_ms(rule: str) -> None:
    sizes = [430 + 13 * (n % 11) for n in range(66)]
    samples = [row_of((TEXT, 12), (IMAGE, 144), (TEXT, 100), (RESPONSE, size - 256)) for size in sizes]
    modality, segment = rectangle(samples, width=32768)
    assert fastest(5, lambda: built(modality, segment, rule)) < 0.010


def test_building_a_small_layout_takes_less_than_a_millisecond() -> None:
    rows = [[row_of((TEXT, 6), (IMAGE, 9), (TEXT, 10 + n % 9), (RESPONSE, 4 + n % 7))] for n in range(32)]
    modality, segment = rectangle(*rows, width=60)
    assert fastest(20, lambda: built(modality, segment, "mma")) < 0.001
