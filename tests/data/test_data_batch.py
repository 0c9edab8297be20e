"""Rows of several samples: what stands where, and that a packed row teaches what its samples teach by themselves."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aki_megatron.data.batch import collate
from aki_megatron.data.image import UnreadableImage, normalize
from aki_megatron.data.packing import Limits, pack
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality, Picture, Sample, stack_ids

PAD, IMAGE, LATENTS, SIZE = 39, 40, 4, 12
TEXT, RESPONSE = int(Modality.TEXT), int(Modality.RESPONSE)


def tiny() -> ModuleType:
    """tests/model/tiny_model.py."""
    path = Path(__file__).parents[1] / "model" / "tiny_model.py"
    spec = importlib.util.spec_from_file_location("tiny_model_for_batches", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample(number: int, prompt: int, answer: int, *, image: bool) -> Sample:
    """Text of its own, an answer that is learnt, and where asked a picture of its own after the second token."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, PAD, (prompt + answer,), generator=generator).tolist()
    kinds = [TEXT] * prompt + [RESPONSE] * answer
    targets = [IGNORE] * (prompt - 1) + tokens[prompt:] + [IGNORE]
    if not image:
        return Sample(f"s/{number}", tokens, kinds, targets, None)
    tokens[2:2], kinds[2:2], targets[2:2] = [IMAGE] * LATENTS, [int(Modality.IMAGE)] * LATENTS, [IGNORE] * LATENTS
    rgb = torch.randint(0, 256, (SIZE * SIZE * 3,), generator=generator, dtype=torch.uint8)
    return Sample(f"s/{number}", tokens, kinds, targets, Picture(rgb.numpy().tobytes(), SIZE))


SAMPLES = [sample(number, 3 + number % 4, 1 + number * 5 % 7, image=number % 3 != 1) for number in range(9)]
ROWS = [[SAMPLES[n] for n in row] for row in ((0, 3, 4), (1, 2), (5, 6, 7, 8))]


def batch_of(rows: Sequence[Sequence[Sample]], sequence_length: int | None = None) -> Batch:
    return collate(rows, pad_id=PAD, image_size=SIZE, sequence_length=sequence_length)


def equal(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(torch.as_tensor(getattr(one, name)), torch.as_tensor(getattr(other, name)))
        for name in one.__dataclass_fields__
    )


def test_several_samples_stand_in_one_row() -> None:
    short = Sample("a", [5, 6], [1, 2], [6, IGNORE], None)
    long = Sample("b", [5, 7, 7, 8], [1, 3, 3, 2], [IGNORE, IGNORE, 8, IGNORE], Picture(bytes(48), 4))
    none = NO_SEGMENT
    batch = collate([[short, long], [long]], pad_id=99, image_size=4, sequence_length=8)
    assert batch.token_ids.tolist() == [[5, 6, 5, 7, 7, 8, 99, 99], [5, 7, 7, 8, 99, 99, 99, 99]]
    assert batch.modality_ids.tolist() == [[1, 2, 1, 3, 3, 2, 0, 0], [1, 3, 3, 2, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1, 1, 1, none, none], [0, 0, 0, 0, none, none, none, none]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 0, 0, 0, 0]]
    ignored = [IGNORE] * 4
    assert batch.targets.tolist() == [
        [6, IGNORE, IGNORE, IGNORE, 8, *ignored[:3]],
        [IGNORE, IGNORE, 8, IGNORE, *ignored],
    ]
    assert batch.pixels.shape == (2, 3, 4, 4)
    kinds = [batch.token_ids, batch.modality_ids, batch.segment_ids, batch.position_ids, batch.targets, batch.pixels]
    assert [tensor.dtype for tensor in kinds] == [
        torch.int64,
        torch.int8,
        torch.int32,
        torch.int32,
        torch.int64,
        torch.float32,
    ]


def test_rows_are_as_wide_as_the_longest_or_as_asked() -> None:
    longest = max(sum(len(sample.token_ids) for sample in row) for row in ROWS)
    assert batch_of(ROWS).token_ids.shape == (3, longest)
    wide = batch_of(ROWS, longest + 5)
    assert wide.token_ids.shape == (3, longest + 5)
    assert (wide.segment_ids[:, longest:] == NO_SEGMENT).all() and (wide.token_ids[:, longest:] == PAD).all()
    with pytest.raises(ValueError, match=f"holds {longest} tokens, more than sequence_length={longest - 1}"):
        batch_of(ROWS, longest - 1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 8), max_size=4), min_size=1, max_size=4), st.integers(0, 3))
def test_every_segment_is_its_sample_and_nothing_else_is_there(numbers: list[list[int]], spare: int) -> None:
    rows = [[SAMPLES[n] for n in row] for row in numbers]
    width = max(1, *(sum(len(sample.token_ids) for sample in row) for row in rows)) + spare
    batch = batch_of(rows, width)
    for line, row in enumerate(rows):
        for segment, expected in enumerate(row):
            here = batch.segment_ids[line] == segment
            assert batch.token_ids[line][here].tolist() == expected.token_ids
            assert batch.modality_ids[line][here].tolist() == expected.modality_ids
            assert batch.targets[line][here].tolist() == expected.targets
            assert batch.position_ids[line][here].tolist() == list(range(len(expected.token_ids)))
            last = int(here.nonzero().max())
            assert batch.targets[line][last] == IGNORE  # nothing is predicted across the border
        rest = (batch.segment_ids[line] < 0) | (batch.segment_ids[line] >= len(row))
        assert int(rest.sum()) == width - sum(len(sample.token_ids) for sample in row)
        assert (batch.segment_ids[line][rest] == NO_SEGMENT).all() and (batch.targets[line][rest] == IGNORE).all()
        assert (batch.modality_ids[line][rest] == Modality.PAD).all() and (batch.token_ids[line][rest] == PAD).all()
    assert batch.supervised_tokens == sum(t != IGNORE for row in rows for sample in row for t in sample.targets)


def test_the_images_of_a_batch_follow_their_segments() -> None:
    batch = batch_of(ROWS)
    pictures = [sample.image for row in ROWS for sample in row if sample.image is not None]
    assert torch.equal(batch.pixels, normalize(pictures, SIZE))
    lines, places = (batch.modality_ids == Modality.IMAGE).nonzero(as_tuple=True)
    owners = list(dict.fromkeys(zip(lines.tolist(), batch.segment_ids[lines, places].tolist(), strict=True)))
    assert owners == [(line, n) for line, row in enumerate(ROWS) for n, s in enumerate(row) if s.image is not None]
    assert len(lines) == LATENTS * len(pictures)


def test_a_hole_leaves_nothing_and_a_row_may_be_empty() -> None:
    with_hole = batch_of([[ROWS[0][0], ROWS[0][2]], []], 40)
    assert with_hole.segment_ids[0].unique().tolist() == [NO_SEGMENT, 0, 1]
    assert with_hole.pixels.shape[0] == 1
    assert (with_hole.segment_ids[1] == NO_SEGMENT).all() and (with_hole.targets[1] == IGNORE).all()
    assert batch_of([[]]).token_ids.tolist() == [[PAD]]
    with pytest.raises(UnreadableImage, match="sample s/0"):
        batch_of([[replace(SAMPLES[0], image=b"x"), SAMPLES[1]]])


def taught(model: Stage, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of all batches and its gradients."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = model(batch.token_ids, stack_ids(batch), batch.pixels.double())
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(params=["mma", "causal"])
def model(request: pytest.FixtureRequest) -> Stage:
    return build_model(tiny().CONFIG, rule=request.param, seed=3).double()


def test_packed_rows_teach_what_their_samples_teach_alone(model: Stage) -> None:
    alone, gradients = taught(model, [batch_of([[one]]) for one in SAMPLES])
    assert alone > 1 and all(gradient.isfinite().all() for gradient in gradients.values())
    lengths, images = [len(s.token_ids) for s in SAMPLES], [int(s.image is not None) for s in SAMPLES]
    packed = [[SAMPLES[n] for n in row] for row in pack(lengths, images, Limits(32, 2))]
    assert len(packed) < len(SAMPLES)
    for rows, sequence_length in ((ROWS, None), (ROWS, 64), (packed, 32), ([*packed, []], 32), ([SAMPLES], None)):
        loss, found = taught(model, [batch_of(rows, sequence_length)])
        assert abs(float(loss - alone)) <= 1e-10
        assert farthest(found, gradients) <= 1e-10


def damaged(batch: Batch, kind: str) -> Batch:
    real = batch.segment_ids != NO_SEGMENT
    if kind == "one segment":
        return replace(batch, segment_ids=torch.where(real, 0, batch.segment_ids))
    if kind == "images swapped":
        return replace(batch, pixels=batch.pixels.flip(0))
    return replace(batch, targets=batch.targets.roll(1, dims=1))


@pytest.mark.parametrize("kind", ["one segment", "images swapped", "targets shifted"])
def test_the_comparison_sees_a_damaged_row(kind: str) -> None:
    causal = build_model(tiny().CONFIG, rule="causal", seed=3).double()
    alone, gradients = taught(causal, [batch_of([[one]]) for one in SAMPLES])
    loss, found = taught(causal, [damaged(batch_of(ROWS), kind)])
    assert abs(float(loss - alone)) > 1e-4 and farthest(found, gradients) > 1e-4


def test_one_row_per_sample_equals_right_padding() -> None:
    batch = batch_of([[one] for one in SAMPLES])
    assert equal(batch, batch_of([[one] for one in SAMPLES], batch.token_ids.shape[1]))
    assert (batch.segment_ids <= 0).all() and len(batch.token_ids) == len(SAMPLES)
