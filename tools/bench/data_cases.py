"""What tools/bench/data.py measures: pictures drawn into tars and files, and three ways to read them as batches.

All three decode with the same function (PIL, RGB, bicubic, normalized to [-1, 1]), tokenize the captions with the same
template, and give float32 [B, 3, S, S]; ours also makes the other tensors of a batch.
"""

import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from aki_megatron.data.bad_samples import BadSampleBudget
from aki_megatron.data.batch_planner import BatchPlanner, Phase
from aki_megatron.data.image import load_image
from aki_megatron.data.loader import Loader, MicroBatches
from aki_megatron.data.mixture import Mixture
from aki_megatron.data.sample_stream import MixedStream, Source
from aki_megatron.data.shard_order import ShardOrder
from aki_megatron.data.shards import ShardIndex
from aki_megatron.data.template import Template
from aki_megatron.synthetic.writers import write_tar
from aki_megatron.types import Caption

WORDS = """
a the of on in with and photograph street red blue small large wooden table window person dog sitting standing near
background sky light building green trees sign text reads left right two several white car evening glass
"""
CAPTION_WORDS = 67
"""Words of a caption of BLIP3-KALE on average."""
ENDLESS = 1 << 40


def captions(number: int, *, seed: int = 0) -> list[str]:
    """Made-up captions."""
    draws = np.random.default_rng(seed)
    words = WORDS.split()
    return [" ".join(draws.choice(words, CAPTION_WORDS)) for _ in range(number)]


def jpegs(number: int, width: int, height: int, *, seed: int = 0) -> list[bytes]:
    """Pictures with large and small structures, as JPEG of quality 85: near 60 KB at 640 x 480, as photographs are."""
    draws = np.random.default_rng(seed)
    encoded = []
    for _ in range(number):
        coarse = draws.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        fine = draws.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        layers = [Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC) for layer in (coarse, fine)]
        written = io.BytesIO()
        Image.blend(layers[0], layers[1], 0.2).save(written, "JPEG", quality=85)
        encoded.append(written.getvalue())
    return encoded


@dataclass(frozen=True)
class Drawn:
    """The same pictures and captions twice: in tars, and as files of a folder."""

    tars: list[Path]
    files: list[Path]
    picture_bytes: float
    """On average."""


def draw(folder: Path, pictures: int, tars: int, width: int = 640, height: int = 480) -> Drawn:
    """Write both, each tar with an equal share."""
    images, texts = jpegs(pictures, width, height), captions(pictures)
    paths, files = [], []
    (folder / "files").mkdir(parents=True)
    for tar in range(tars):
        path = folder / f"{tar:05d}.tar"
        write_tar(path, ((f"{n:06d}", "jpg", images[n], texts[n]) for n in range(tar, pictures, tars)))
        paths.append(path)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        file = folder / "files" / f"{number:06d}.jpg"
        file.write_bytes(image)
        file.with_suffix(".txt").write_text(text)
        files.append(file)
    return Drawn(paths, files, sum(map(len, images)) / pictures)


Batches = Iterator[torch.Tensor]
"""Endless float32 [B, 3, S, S]."""


def our_loader(index: ShardIndex, template: Template, *, size: int, batch: int, micros: int, workers: int) -> Loader:
    """A pretraining run's loader over tars: ``micros`` micro-batches of ``batch`` samples per step."""
    order = ShardOrder(index.counts, seed=0)
    source: Source[Caption] = Source(index, order=order)
    stream = MixedStream({"captions": source}, Mixture({"captions": 1.0}, seed=0), template.render_caption,
                         image_size=size)  # fmt: skip
    planner = BatchPlanner([Phase(ENDLESS, stream)], step_rows=batch * micros, micro_batch_size=batch)
    micro_batches = MicroBatches([stream], pad_id=template.tokenizer.pad, image_size=size, sequence_length=None)
    return Loader(planner, micro_batches, losses=BadSampleBudget(0.0), workers=workers)


def ours(drawn: Drawn, template: Template, *, size: int, batch: int, micros: int, workers: int) -> Batches:
    """This project's loader."""
    index = ShardIndex([str(tar) for tar in drawn.tars], drawn.tars[0].parent)
    loader = our_loader(index, template, size=size, batch=batch, micros=micros, workers=workers)
    with closing(loader):
        for step in loader.steps(0):
            yield from (one.pixels for one in step.batches)


@dataclass(frozen=True)
class Read:
    """What the plain pipelines do with an encoded picture and its text; picklable for their workers."""

    template: Template
    size: int

    def picture(self, encoded: bytes) -> torch.Tensor:
        """float32 [3, S, S]"""
        return load_image(encoded, self.size)

    def tokens(self, text: bytes) -> list[int]:
        """Token ids of the caption."""
        sample = self.template.render_caption(Caption("", text.decode("utf-8"), b""))
        return sample.token_ids if sample is not None else []


def plain_webdataset(drawn: Drawn, read: Read, *, batch: int, workers: int) -> Batches:
    """The pipeline of webdataset's manual without its shuffle, tars dealt to the workers."""
    dataset = (
        webdataset.WebDataset([str(tar) for tar in drawn.tars], shardshuffle=False)
        .to_tuple("jpg", "txt")
        .map_tuple(read.picture, read.tokens)
        .batched(batch, partial=False)
        .repeat()
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=_fork(workers))
    for pixels, _ in loader:
        yield pixels


class _Files(Dataset[tuple[torch.Tensor, list[int]]]):
    def __init__(self, files: Sequence[Path], read: Read) -> None:
        self.files, self.read = files, read

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[int]]:
        file = self.files[index]
        return self.read.picture(file.read_bytes()), self.read.tokens(file.with_suffix(".txt").read_bytes())


def _stack(members: Sequence[tuple[torch.Tensor, list[int]]]) -> tuple[torch.Tensor, list[list[int]]]:
    return torch.stack([pixels for pixels, _ in members]), [tokens for _, tokens in members]


def torch_files(drawn: Drawn, read: Read, *, batch: int, workers: int) -> Batches:
    """torch's DataLoader over a shuffled folder; its workers stay from pass to pass."""
    loader = DataLoader(
        _Files(drawn.files, read),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_stack,
        multiprocessing_context=_fork(workers),
    )
    while True:
        for pixels, _ in loader:
            yield pixels


def _fork(workers: int) -> str | None:
    return "fork" if workers else None


@dataclass(frozen=True)
class Speed:
    """Images per second that passed, and per second of processor time of all processes together."""

    per_second: float
    per_core_second: float


def timed(start: Callable[[], Batches], *, warm: int, measured: int) -> Speed:
    """Speed over ``measured`` batches after ``warm`` ones: a steady state, in which the consumer waits for the rest."""
    batches = start()
    try:
        for _ in range(warm):
            next(batches)
        begin, processor = time.perf_counter(), processor_seconds()
        images = sum(len(next(batches)) for _ in range(measured))
        spent, used = time.perf_counter() - begin, processor_seconds() - processor
    finally:
        batches.close()  # type: ignore[attr-defined]  # a generator; ends its processes
    return Speed(images / spent, images / used)


def processor_seconds() -> float:
    """Of this process and of the worker processes it has now, all threads."""
    ticks = 0
    for child in multiprocessing.active_children():
        # after the name, which may hold anything: fields 14 and 15 of proc(5), utime and stime
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
