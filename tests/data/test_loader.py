"""Batches: padding, the split over ranks, restart at any step, prefetch, errors and clean shutdown."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from data_files import IMAGE_DECODERS, IMAGE_SIZE

from aki_megatron.data.bad_samples import BadSample, BadSampleBudget, BadSampleBudgetExceeded
from aki_megatron.data.batch_planner import BatchPlanner, Phase
from aki_megatron.data.collate import collate
from aki_megatron.data.image import UnreadableImage, normalize
from aki_megatron.data.loader import LoadedStep, MicrobatchDataset, StepLoader
from aki_megatron.data.mixture import Mixture
from aki_megatron.data.packing import PackedSampler, PackingLimits
from aki_megatron.data.sample_stream import LoadedSample, MixtureStream, Source
from aki_megatron.data.sources import open_sources
from aki_megatron.errors import CheckpointError, DataError
from aki_megatron.types import (
    IGNORE,
    NO_SEGMENT,
    Batch,
    Conversation,
    DecodedImage,
    Modality,
    Sample,
    Turn,
    image_items,
)

PAD = 99


class NumberedStream:
    """Sample n holds the number n; its length varies."""

    def __init__(self, *, fails_at: int | None = None, bad_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.bad_at = bad_at

    def sample(self, n: int, *, replace_images: bool = True) -> LoadedSample:
        if n == self.fails_at:
            raise BadSampleBudgetExceeded(f"sample {n}")
        if n == self.bad_at and not replace_images:
            return LoadedSample(None, (BadSample("numbers", f"no image {n}"),))
        num_tokens = self.length(n)[0]
        image = DecodedImage(bytes([n % 256]) * 3 * 16, 4) if n % 3 else None
        targets = [IGNORE] * (num_tokens - 2) + [n, IGNORE]
        return LoadedSample(
            Sample(f"numbers/{n}", [n] * num_tokens, [1] * (num_tokens - 1) + [2], targets, image_items(image)), ()
        )

    def length(self, n: int) -> tuple[int, int]:
        return 2 + n % 5, int(bool(n % 3))


def loader(
    stream=None, *, phases=None, sequence_length=None, micro_batch_size=2, image_size=4, budget=0.0, **options
) -> StepLoader:
    phases = phases or [Phase(10**9, stream or NumberedStream())]
    ranks = {name: options.pop(name) for name in ("data_rank", "data_size") if name in options}
    planner = BatchPlanner(phases, global_batch_size=8, micro_batch_size=micro_batch_size, **ranks)
    streams = [phase.stream for phase in phases]
    dataset = MicrobatchDataset(streams, pad_id=PAD, image_size=image_size, sequence_length=sequence_length)
    return StepLoader(planner, dataset, bad_sample_budget=BadSampleBudget(budget), **options)


def load(step_loader: StepLoader, step: int) -> list[Batch]:
    """Load one step alone."""
    iterator = step_loader.steps(step)
    batches = next(iterator).batches
    step_loader.close()
    return list(batches)


def numbers(batch: Batch) -> list[int]:
    return batch.token_ids[:, 0].tolist()


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        (a.num_bad_samples, a.num_cut_samples) == (b.num_bad_samples, b.num_cut_samples)
        and all(map(torch.equal, a.tensors(), b.tensors()))
        for a, b in zip(one, other, strict=True)
    )


def test_collate_pads_on_the_right() -> None:
    short = Sample("a", [5, 6], [1, 2], [6, IGNORE])
    long = Sample("b", [5, 7, 7, 8], [1, 3, 3, 2], [IGNORE, IGNORE, 8, IGNORE], image_items(DecodedImage(bytes(48), 4)))
    batch = collate([[short], [long]], pad_id=PAD, image_size=4)
    assert batch.token_ids.tolist() == [[5, 6, PAD, PAD], [5, 7, 7, 8]]
    assert batch.modality_ids.tolist() == [[1, 2, Modality.PAD, Modality.PAD], [1, 3, 3, 2]]
    assert batch.segment_ids.tolist() == [[0, 0, NO_SEGMENT, NO_SEGMENT], [0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert batch.targets.tolist() == [[6, IGNORE, IGNORE, IGNORE], [IGNORE, IGNORE, 8, IGNORE]]
    assert batch.media[Modality.IMAGE].shape == (1, 3, 4, 4) and batch.media[Modality.IMAGE].eq(-1).all()
    kinds = batch.tensors()
    dtypes = [torch.int64, torch.int8, torch.int32, torch.int32, torch.int64, torch.float32]
    assert [tensor.dtype for tensor in kinds] == dtypes
    assert batch.supervised_tokens == 2


def test_collate_decodes_what_is_still_encoded_and_takes_batches_without_image(source_root: Path) -> None:
    file = source_root / "VQA/train2014/COCO_train2014_000000000001.jpg"
    encoded = [
        Sample("a", [1], [3], [IGNORE], image_items(file)),
        Sample("b", [1], [3], [IGNORE], image_items(file.read_bytes())),
    ]
    batch = collate([[sample] for sample in encoded], pad_id=PAD, image_size=IMAGE_SIZE)
    assert batch.media[Modality.IMAGE].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE) and torch.equal(
        batch.media[Modality.IMAGE][0], batch.media[Modality.IMAGE][1]
    )
    with pytest.raises(UnreadableImage, match="sample c"):
        collate([[Sample("c", [1], [3], [IGNORE], image_items(b"x"))]], pad_id=PAD, image_size=4)
    without = collate([[Sample("d", [1], [1], [IGNORE])]], pad_id=PAD, image_size=4)
    assert without.media[Modality.IMAGE].shape == (0, 3, 4, 4)


def test_images_are_in_the_order_of_their_sequences() -> None:
    (batch,) = load(loader(micro_batch_size=8), 0)
    expected = [DecodedImage(bytes([n]) * 48, 4) for n in range(8) if n % 3]
    assert torch.equal(batch.media[Modality.IMAGE], normalize(expected, 4))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 3, 1_000_000])
def test_a_step_holds_the_same_samples_in_the_same_order_on_any_number_of_ranks(ranks: int, step: int) -> None:
    parts = [load(loader(data_rank=rank, data_size=ranks), step) for rank in range(ranks)]
    together = [n for microbatches in zip(*parts, strict=True) for batch in microbatches for n in numbers(batch)]
    assert together == list(range(8 * step, 8 * step + 8))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_restart_at_any_step_gives_the_same_batches(num_workers: int) -> None:
    whole = loader(num_workers=num_workers)
    undisturbed = [step.batches for _, step in zip(range(9), whole.steps(0), strict=False)]
    whole.close()
    for start in (1, 4, 8):
        resumed = loader()
        again = (step.batches for step in resumed.steps(start))
        assert all(equal(one, other) for one, other in zip(undisturbed[start:], again, strict=False))
        resumed.close()


def packed_phases(*, stream=None) -> list[Phase]:
    """Two phases over the same samples, each packed in its own order."""
    stream = stream or NumberedStream()
    orders = [PackedSampler(stream.length, PackingLimits(16, 4), buffer_size=40, seed=seed) for seed in (1, 2)]
    return [Phase(7, stream, orders[0]), Phase(5, stream, orders[1])]


def hashes(steps: list[LoadedStep]) -> list[tuple[int, int]]:
    return [(step.samples_hash, step.num_samples) for step in steps]


def take(step_loader: StepLoader, count: int, start: int = 0, state=None) -> list[LoadedStep]:
    steps = [step for _, step in zip(range(count), step_loader.steps(start, state), strict=False)]
    step_loader.close()
    return steps


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_packed_sequences_resume_anywhere_on_any_number_of_ranks(ranks: int) -> None:
    """Blocks end in the middle of steps and phases in the middle of blocks; two integers are the whole state."""
    whole = take(loader(phases=packed_phases(), sequence_length=16), 12)
    assert all(batch.token_ids.shape[1] == 16 for step in whole for batch in step.batches)
    assert all(int(batch.segment_ids.max()) > 0 for batch in whole[0].batches)
    for start in (0, 1, 3, 6, 7, 8, 11):
        state = whole[start - 1].next_state if start else None
        parts = [
            take(
                loader(phases=packed_phases(), sequence_length=16, data_rank=r, data_size=ranks),
                12 - start,
                start,
                state,
            )
            for r in range(ranks)
        ]
        for number, steps in enumerate(zip(*parts, strict=True), start):
            together = [
                batch for microbatches in zip(*(step.batches for step in steps), strict=True) for batch in microbatches
            ]
            assert equal(together, list(whole[number].batches))
            assert sum(step.samples_hash for step in steps) % 2**64 == whole[number].samples_hash
            assert {tuple(step.next_state.items()) for step in steps} == {tuple(whole[number].next_state.items())}
    assert len({value for value, _ in hashes(whole)}) == 12


def test_packed_runs_train_every_sample_of_a_block_once() -> None:
    steps = take(loader(phases=[packed_phases()[0]], sequence_length=16), 30)
    seen = [
        n
        for step in steps
        for batch in step.batches
        for tokens, segments in zip(batch.token_ids.tolist(), batch.segment_ids.tolist(), strict=True)
        for position, n in enumerate(tokens)
        if segments[position] >= 0 and (position == 0 or segments[position] != segments[position - 1])
    ]
    blocks = len(seen) // 40
    assert blocks > 5 and sorted(seen[: 40 * (blocks - 1)]) != seen[: 40 * (blocks - 1)]
    assert set(range(40 * (blocks - 1))) <= set(seen) and len(seen) == len(set(seen))


def test_a_bad_sample_of_a_packed_sequence_is_counted_and_the_others_stay() -> None:
    damaged = NumberedStream(bad_at=5)
    step_loader = loader(phases=packed_phases(stream=damaged), sequence_length=16, budget=0.5)
    steps, whole = take(step_loader, 3), take(loader(phases=packed_phases(), sequence_length=16), 3)
    assert step_loader.bad_sample_budget.first_reasons == ["no image 5"]
    assert sum(batch.num_bad_samples for step in steps for batch in step.batches) == 1
    assert [step.next_state for step in steps] == [step.next_state for step in whole]
    assert sum(step.num_samples for step in whole) - sum(step.num_samples for step in steps) == 1
    assert sum(one.samples_hash != other.samples_hash for one, other in zip(steps, whole, strict=True)) == 1


def test_a_packed_run_does_not_go_on_without_its_state() -> None:
    another_phase = {"version": 2, "phase": 1, "block": 0, "sequence": 0}
    for state, message in ((None, "missing"), ({"version": 1}, "version than 2"), (another_phase, "of phase 1")):
        with pytest.raises(CheckpointError, match=message):
            take(loader(phases=packed_phases(), sequence_length=16), 1, 3, state)


def test_phases_follow_each_other_and_the_last_goes_on() -> None:
    class Shifted(NumberedStream):
        def sample(self, n: int, *, replace_images: bool = True) -> LoadedSample:
            return super().sample(n + 1000)

    phases = [Phase(3, NumberedStream()), Phase(2, Shifted())]
    firsts = [numbers(step.batches[0])[0] for step in take(loader(phases=phases), 7)]
    assert firsts == [0, 8, 16, 1000, 1008, 1016, 1024]
    assert numbers(load(loader(phases=phases), 4)[0])[0] == 1008


@pytest.mark.parametrize("num_workers", [1, 3])
def test_worker_processes_change_nothing(num_workers: int) -> None:
    in_process = take(loader(phases=packed_phases(), sequence_length=16), 12)
    in_workers = take(loader(phases=packed_phases(), sequence_length=16, num_workers=num_workers), 12)
    assert hashes(in_process) == hashes(in_workers) and [step.next_state for step in in_process] == [
        step.next_state for step in in_workers
    ]
    assert all(equal(list(one.batches), list(other.batches)) for one, other in zip(in_process, in_workers, strict=True))


def test_worker_processes_end_with_the_loader() -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    step_loader = loader(num_workers=2)
    iterator = step_loader.steps(0)
    next(iterator)
    started = {child.pid for child in multiprocessing.active_children()} - before
    assert len(started) == 2
    step_loader.close()
    assert not {child.pid for child in multiprocessing.active_children()} & started
    with pytest.raises(StopIteration):
        next(iterator)


def test_a_worker_process_that_is_killed_is_an_error_not_a_hang() -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    step_loader = loader(num_workers=1)
    iterator = step_loader.steps(0)
    next(iterator)
    (victim,) = {child.pid for child in multiprocessing.active_children()} - before
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(DataError, match="ended without an error message.*data.num_workers"):
        for _ in range(100):
            next(iterator)
    step_loader.close()


def test_nothing_grows_over_ten_thousand_batches() -> None:
    step_loader = loader(micro_batch_size=8, num_workers=1)
    iterator = step_loader.steps(0)
    sizes, handles = [[], []], [[], []]
    for number in range(10_000):
        next(iterator)
        if number % 2000 >= 1950 and number // 2000 in (0, 4):  # how many batches wait differs: the fewest are compared
            if number % 10 == 0:  # a collection of all objects takes a tenth of a second
                gc.collect()
            sizes[number // 8000].append(resident_bytes())
            handles[number // 8000].append(len(os.listdir("/proc/self/fd")))
    step_loader.close()
    assert min(sizes[1]) - min(sizes[0]) < 8 * 2**20
    assert min(handles[1]) <= min(handles[0]) + 8


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_the_background_is_raised_at_its_step(num_workers: int) -> None:
    failing = loader(NumberedStream(fails_at=21), num_workers=num_workers)
    iterator = failing.steps(0)
    assert [numbers(next(iterator).batches[0])[0] for _ in range(2)] == [0, 8]
    with pytest.raises(BadSampleBudgetExceeded, match="^sample 21$"):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    failing.close()


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_no_thread_is_left() -> None:
    closed = loader()
    iterator = closed.steps(0)
    next(iterator)
    assert loader_threads()
    closed.close()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(iterator)
    next(iter(loader().steps(0)))  # never closed, and its queue can no longer be emptied
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not loader_threads()


def test_prefetch_is_bounded() -> None:
    requested: list[int] = []

    class Recording(NumberedStream):
        def sample(self, n: int, *, replace_images: bool = True) -> LoadedSample:
            requested.append(n)
            return super().sample(n)

    recording = loader(Recording(), prefetch_steps=3)
    iterator = recording.steps(0)
    next(iterator)
    time.sleep(0.3)
    assert max(requested) < 8 * 5  # one taken, three in the queue, one in the thread
    recording.close()


def test_real_streams_give_equal_batches_on_one_and_two_ranks(source_root: Path, make_template) -> None:
    def build(rank: int, ranks: int) -> StepLoader:
        sources = {name: Source(items) for name, items in open_sources(source_root, ["vqav2", "vsr"], "train").items()}
        mixture = Mixture({"vqav2": 1.0, "vsr": 1.0}, seed=4)
        stream = MixtureStream(sources, mixture, make_template().render_conversation, decoders=IMAGE_DECODERS)
        return loader(stream, image_size=IMAGE_SIZE, data_rank=rank, data_size=ranks)

    for step in (0, 5):
        single, halves = load(build(0, 1), step), [load(build(rank, 2), step) for rank in range(2)]
        assert equal(single, [batch for microbatches in zip(*halves, strict=True) for batch in microbatches])


def test_text_only_conversations_make_a_batch(make_template) -> None:
    sample = make_template().render_conversation(Conversation("t/1", (Turn("What is 12?", "12"),)))
    batch = collate([[sample], [sample]], pad_id=PAD, image_size=4)
    assert batch.media[Modality.IMAGE].shape[0] == 0 and not (batch.modality_ids == Modality.IMAGE).any()
