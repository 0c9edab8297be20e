"""Batches: padding, the split over ranks, restart at any step, prefetch, errors and clean shutdown."""

import threading
import time
from pathlib import Path

import pytest
import torch
from data_files import PICTURE_SIZE

from aki_megatron.data.batch import collate
from aki_megatron.data.image import UnreadableImage, normalize
from aki_megatron.data.loader import Loader
from aki_megatron.data.sources import open_sources
from aki_megatron.data.stream import ConversationStream, Losses, TooManyLost
from aki_megatron.flow import IGNORE, NO_SEGMENT, Batch, Conversation, Modality, Picture, Sample, Turn

PAD = 99


class NumberedStream:
    """Sample n holds the number n; its length varies."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.losses = Losses(0.0)
        self.fails_at = fails_at

    def sample(self, n: int) -> Sample:
        if n == self.fails_at:
            raise TooManyLost(f"sample {n}")
        length = 2 + n % 5
        picture = Picture(bytes([n % 256]) * 3 * 16, 4) if n % 3 else None
        return Sample(
            f"numbers/{n}", [n] * length, [1] * (length - 1) + [2], [IGNORE] * (length - 2) + [n, IGNORE], picture
        )


def loader(stream=None, **options) -> Loader:
    return Loader(
        stream or NumberedStream(), **{"pad_id": PAD, "image_size": 4, "global_batch": 8, "micro_batch": 2} | options
    )


def numbers(batch: Batch) -> list[int]:
    return batch.token_ids[:, 0].tolist()


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one, other, strict=True)
        for name in a.__dataclass_fields__
    )


def test_collate_pads_on_the_right() -> None:
    short = Sample("a", [5, 6], [1, 2], [6, IGNORE], None)
    long = Sample("b", [5, 7, 7, 8], [1, 3, 3, 2], [IGNORE, IGNORE, 8, IGNORE], Picture(bytes(48), 4))
    batch = collate([[short], [long]], pad_id=PAD, image_size=4)
    assert batch.token_ids.tolist() == [[5, 6, PAD, PAD], [5, 7, 7, 8]]
    assert batch.modality_ids.tolist() == [[1, 2, Modality.PAD, Modality.PAD], [1, 3, 3, 2]]
    assert batch.segment_ids.tolist() == [[0, 0, NO_SEGMENT, NO_SEGMENT], [0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert batch.targets.tolist() == [[6, IGNORE, IGNORE, IGNORE], [IGNORE, IGNORE, 8, IGNORE]]
    assert batch.pixels.shape == (1, 3, 4, 4) and batch.pixels.eq(-1).all()
    kinds = [batch.token_ids, batch.modality_ids, batch.segment_ids, batch.position_ids, batch.targets, batch.pixels]
    dtypes = [torch.int64, torch.int8, torch.int32, torch.int32, torch.int64, torch.float32]
    assert [tensor.dtype for tensor in kinds] == dtypes
    assert batch.supervised_tokens == 2


def test_collate_decodes_what_is_still_encoded_and_takes_batches_without_image(source_root: Path) -> None:
    file = source_root / "VQA/train2014/COCO_train2014_000000000001.jpg"
    encoded = [Sample("a", [1], [3], [IGNORE], file), Sample("b", [1], [3], [IGNORE], file.read_bytes())]
    batch = collate([[sample] for sample in encoded], pad_id=PAD, image_size=PICTURE_SIZE)
    assert batch.pixels.shape == (2, 3, PICTURE_SIZE, PICTURE_SIZE) and torch.equal(batch.pixels[0], batch.pixels[1])
    with pytest.raises(UnreadableImage, match="sample c"):
        collate([[Sample("c", [1], [3], [IGNORE], b"x")]], pad_id=PAD, image_size=4)
    assert collate([[Sample("d", [1], [1], [IGNORE], None)]], pad_id=PAD, image_size=4).pixels.shape == (0, 3, 4, 4)


def test_images_stand_in_the_order_of_their_rows() -> None:
    (batch,) = loader(global_batch=8, micro_batch=8).load(0)
    expected = [Picture(bytes([n]) * 48, 4) for n in range(8) if n % 3]
    assert torch.equal(batch.pixels, normalize(expected, 4))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 3, 1_000_000])
def test_a_step_holds_the_same_samples_in_the_same_order_on_any_number_of_ranks(ranks: int, step: int) -> None:
    parts = [loader(data_rank=rank, data_size=ranks).load(step) for rank in range(ranks)]
    together = [n for micro in zip(*parts, strict=True) for batch in micro for n in numbers(batch)]
    assert together == list(range(8 * step, 8 * step + 8))


def test_restart_at_any_step_gives_the_same_batches() -> None:
    whole = loader()
    undisturbed = [step for _, step in zip(range(9), whole.steps(0), strict=False)]
    whole.close()
    for start in (1, 4, 8):
        resumed = loader()
        assert all(equal(one, other) for one, other in zip(undisturbed[start:], resumed.steps(start), strict=False))
        resumed.close()


def test_steps_end_at_stop_and_run_on_without() -> None:
    bounded = loader(prefetch_steps=1)
    assert [numbers(step[0])[0] for step in bounded.steps(2, 6)] == [16, 24, 32, 40]
    iterator = bounded.steps(0)
    assert [numbers(next(iterator)[0])[0] for _ in range(30)] == list(range(0, 240, 8))
    bounded.close()


def test_an_error_in_the_background_is_raised_at_its_step() -> None:
    failing = loader(NumberedStream(fails_at=21))
    iterator = failing.steps(0)
    assert [numbers(next(iterator)[0])[0] for _ in range(2)] == [0, 8]
    with pytest.raises(TooManyLost, match="sample 21"):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    failing.close()


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_no_thread_stays_behind() -> None:
    closed = loader()
    iterator = closed.steps(0)
    next(iterator)
    assert loader_threads()
    closed.close()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(iterator)
    next(iter(loader().steps(0)))  # never closed, and nobody can empty its queue any more
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not loader_threads()


def test_prefetch_is_bounded() -> None:
    asked: list[int] = []

    class Recording(NumberedStream):
        def sample(self, n: int) -> Sample:
            asked.append(n)
            return super().sample(n)

    recording = loader(Recording(), prefetch_steps=3)
    iterator = recording.steps(0)
    next(iterator)
    time.sleep(0.3)
    assert max(asked) < 8 * 5  # one taken, three waiting, one in the hands of the thread
    recording.close()


def test_real_streams_give_equal_batches_on_one_and_two_ranks(source_root: Path, make_template) -> None:
    def make(rank: int, ranks: int) -> Loader:
        sources = open_sources(source_root, ["vqav2", "vsr"], "train")
        stream = ConversationStream(
            sources,
            {"vqav2": 1.0, "vsr": 1.0},
            make_template(),
            seed=4,
            image_size=PICTURE_SIZE,
            max_bad_fraction=0.001,
        )
        return loader(stream, image_size=PICTURE_SIZE, data_rank=rank, data_size=ranks)

    single, halves = make(0, 1), [make(rank, 2) for rank in range(2)]
    for step in (0, 5):
        joined = [batch for micro in zip(*(half.load(step) for half in halves), strict=True) for batch in micro]
        assert equal(single.load(step), joined)


def test_text_only_conversations_make_a_batch(make_template) -> None:
    sample = make_template().render_conversation(Conversation("t/1", (Turn("What is 12?", "12"),), None))
    batch = collate([[sample], [sample]], pad_id=PAD, image_size=4)
    assert batch.pixels.shape[0] == 0 and not (batch.modality_ids == Modality.IMAGE).any()
