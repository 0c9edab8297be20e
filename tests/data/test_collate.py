"""Sequences of several samples: their layout, and that packing does not change the loss or its gradients."""

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

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.data.collate import collate
from aki_megatron.data.image import UnreadableImage, normalize
from aki_megatron.data.packing import PackingLimits, pack
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, DecodedImage, Modality, Sample, image_items, stack_ids

PAD, IMAGE, LATENTS, SIZE = 39, 40, 4, 12
TEXT, RESPONSE = int(Modality.TEXT), int(Modality.RESPONSE)


def tiny() -> ModuleType:
    """Import tests/model/tiny_model.py."""
    path = Path(__file__).parents[1] / "model" / "tiny_model.py"
    spec = importlib.util.spec_from_file_location("tiny_model_for_batches", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample(number: int, prompt: int, answer: int, *, image: bool) -> Sample:
    """Random text, a supervised answer, and optionally a random image after the second token."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, PAD, (prompt + answer,), generator=generator).tolist()
    kinds = [TEXT] * prompt + [RESPONSE] * answer
    targets = [IGNORE] * (prompt - 1) + tokens[prompt:] + [IGNORE]
    if not image:
        return Sample(f"s/{number}", tokens, kinds, targets)
    tokens[2:2], kinds[2:2], targets[2:2] = [IMAGE] * LATENTS, [int(Modality.IMAGE)] * LATENTS, [IGNORE] * LATENTS
    rgb = torch.randint(0, 256, (SIZE * SIZE * 3,), generator=generator, dtype=torch.uint8)
    return Sample(f"s/{number}", tokens, kinds, targets, image_items(DecodedImage(rgb.numpy().tobytes(), SIZE)))


SAMPLES = [sample(number, 3 + number % 4, 1 + number * 5 % 7, image=number % 3 != 1) for number in range(9)]
SEQUENCES = [[SAMPLES[n] for n in numbers] for numbers in ((0, 3, 4), (1, 2), (5, 6, 7, 8))]


def batch_of(sequences: Sequence[Sequence[Sample]], sequence_length: int | None = None) -> Batch:
    return collate(sequences, pad_id=PAD, image_size=SIZE, sequence_length=sequence_length)


def equal(one: Batch, other: Batch) -> bool:
    counts = [(batch.num_bad_samples, batch.num_cut_samples) for batch in (one, other)]
    return counts[0] == counts[1] and all(map(torch.equal, one.tensors(), other.tensors()))


def test_several_samples_share_a_sequence() -> None:
    short = Sample("a", [5, 6], [1, 2], [6, IGNORE])
    long = Sample("b", [5, 7, 7, 8], [1, 3, 3, 2], [IGNORE, IGNORE, 8, IGNORE], image_items(DecodedImage(bytes(48), 4)))
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
    assert batch.media[Modality.IMAGE].shape == (2, 3, 4, 4)
    kinds = batch.tensors()
    assert [tensor.dtype for tensor in kinds] == [
        torch.int64,
        torch.int8,
        torch.int32,
        torch.int32,
        torch.int64,
        torch.float32,
    ]


def test_sequences_are_as_long_as_the_longest_or_as_requested() -> None:
    longest = max(sum(len(sample.token_ids) for sample in sequence) for sequence in SEQUENCES)
    assert batch_of(SEQUENCES).token_ids.shape == (3, longest)
    padded = batch_of(SEQUENCES, longest + 5)
    assert padded.token_ids.shape == (3, longest + 5)
    assert (padded.segment_ids[:, longest:] == NO_SEGMENT).all() and (padded.token_ids[:, longest:] == PAD).all()
    with pytest.raises(ValueError, match=f"holds {longest} tokens, more than sequence_length={longest - 1}"):
        batch_of(SEQUENCES, longest - 1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 8), max_size=4), min_size=1, max_size=4), st.integers(0, 3))
def test_every_segment_is_its_sample_and_nothing_else_is_there(numbers: list[list[int]], spare: int) -> None:
    sequences = [[SAMPLES[n] for n in chosen] for chosen in numbers]
    length = max(1, *(sum(len(sample.token_ids) for sample in sequence) for sequence in sequences)) + spare
    batch = batch_of(sequences, length)
    for index, sequence in enumerate(sequences):
        for segment, expected in enumerate(sequence):
            own = batch.segment_ids[index] == segment
            assert batch.token_ids[index][own].tolist() == expected.token_ids
            assert batch.modality_ids[index][own].tolist() == expected.modality_ids
            assert batch.targets[index][own].tolist() == expected.targets
            assert batch.position_ids[index][own].tolist() == list(range(len(expected.token_ids)))
            last = int(own.nonzero().max())
            assert batch.targets[index][last] == IGNORE  # nothing is predicted across segments
        rest = (batch.segment_ids[index] < 0) | (batch.segment_ids[index] >= len(sequence))
        assert int(rest.sum()) == length - sum(len(sample.token_ids) for sample in sequence)
        assert (batch.segment_ids[index][rest] == NO_SEGMENT).all() and (batch.targets[index][rest] == IGNORE).all()
        assert (batch.modality_ids[index][rest] == Modality.PAD).all() and (batch.token_ids[index][rest] == PAD).all()
    assert batch.supervised_tokens == sum(
        t != IGNORE for sequence in sequences for sample in sequence for t in sample.targets
    )


def test_the_images_of_a_batch_follow_their_segments() -> None:
    batch = batch_of(SEQUENCES)
    images = [sample.images[0] for sequence in SEQUENCES for sample in sequence if sample.images]
    assert torch.equal(batch.media[Modality.IMAGE], normalize(images, SIZE))
    indices, positions = (batch.modality_ids == Modality.IMAGE).nonzero(as_tuple=True)
    owners = list(dict.fromkeys(zip(indices.tolist(), batch.segment_ids[indices, positions].tolist(), strict=True)))
    assert owners == [
        (index, n) for index, sequence in enumerate(SEQUENCES) for n, s in enumerate(sequence) if s.images
    ]
    assert len(indices) == LATENTS * len(images)


def test_a_sample_may_be_left_out_and_a_sequence_may_be_empty() -> None:
    shortened = batch_of([[SEQUENCES[0][0], SEQUENCES[0][2]], []], 40)
    assert shortened.segment_ids[0].unique().tolist() == [NO_SEGMENT, 0, 1]
    assert shortened.media[Modality.IMAGE].shape[0] == 1
    assert (shortened.segment_ids[1] == NO_SEGMENT).all() and (shortened.targets[1] == IGNORE).all()
    assert batch_of([[]]).token_ids.tolist() == [[PAD]]
    with pytest.raises(UnreadableImage, match="sample s/0"):
        batch_of([[replace(SAMPLES[0], media=image_items(b"x")), SAMPLES[1]]])


def loss_and_gradients(model: Stage, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the summed loss of all batches and its gradients."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = model(batch.token_ids, stack_ids(batch), {Modality.IMAGE: batch.media[Modality.IMAGE].double()})
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def max_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(params=["mma", "causal"])
def model(request: pytest.FixtureRequest) -> Stage:
    return build_model(tiny().CONFIG, attention=AttentionConfig(rule=request.param), seed=3).double()


def test_packed_sequences_give_the_gradients_of_their_samples_alone(model: Stage) -> None:
    alone, gradients = loss_and_gradients(model, [batch_of([[one]]) for one in SAMPLES])
    assert alone > 1 and all(gradient.isfinite().all() for gradient in gradients.values())
    lengths, images = [len(s.token_ids) for s in SAMPLES], [len(s.media) for s in SAMPLES]
    packed = [[SAMPLES[n] for n in sequence] for sequence in pack(lengths, images, PackingLimits(32, 2))]
    assert len(packed) < len(SAMPLES)
    for sequences, sequence_length in (
        (SEQUENCES, None),
        (SEQUENCES, 64),
        (packed, 32),
        ([*packed, []], 32),
        ([SAMPLES], None),
    ):
        loss, found = loss_and_gradients(model, [batch_of(sequences, sequence_length)])
        assert abs(float(loss - alone)) <= 1e-10
        assert max_difference(found, gradients) <= 1e-10


def damaged(batch: Batch, kind: str) -> Batch:
    real = batch.segment_ids != NO_SEGMENT
    if kind == "one segment":
        return replace(batch, segment_ids=torch.where(real, 0, batch.segment_ids))
    if kind == "images swapped":
        return replace(batch, media={Modality.IMAGE: batch.media[Modality.IMAGE].flip(0)})
    return replace(batch, targets=batch.targets.roll(1, dims=1))


@pytest.mark.parametrize("kind", ["one segment", "images swapped", "targets shifted"])
def test_the_comparison_detects_a_damaged_batch(kind: str) -> None:
    causal = build_model(tiny().CONFIG, attention=AttentionConfig(rule="causal"), seed=3).double()
    alone, gradients = loss_and_gradients(causal, [batch_of([[one]]) for one in SAMPLES])
    loss, found = loss_and_gradients(causal, [damaged(batch_of(SEQUENCES), kind)])
    assert abs(float(loss - alone)) > 1e-4 and max_difference(found, gradients) > 1e-4


def test_one_sample_per_sequence_equals_right_padding() -> None:
    batch = batch_of([[one] for one in SAMPLES])
    assert equal(batch, batch_of([[one] for one in SAMPLES], batch.token_ids.shape[1]))
    assert (batch.segment_ids <= 0).all() and len(batch.token_ids) == len(SAMPLES)


def test_cut_samples_are_counted() -> None:
    sample = Sample("a/b/1", [5, 6], [int(Modality.TEXT), int(Modality.RESPONSE)], [6, IGNORE])
    batch = collate([[sample, replace(sample, num_cut_tokens=3)], [replace(sample, num_cut_tokens=1)]], pad_id=0,
                    image_size=4)  # fmt: skip
    assert batch.num_cut_samples == 2
