"""What tools/bench/data.py measures: synthetic images in tars and files, and three ways to read them as batches.

All three decode with the same function (PIL, RGB, bicubic, normalized to [-1, 1]), tokenize the captions with the same
template, and yield float32 [B, 3, S, S]; ours also builds the other tensors of a batch.
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
from aki_megatron.data.image import ImageCache, decode_image, normalize
from aki_megatron.data.loader import MicrobatchDataset, StepLoader
from aki_megatron.data.mixture import Mixture
from aki_megatron.data.sample_stream import MixtureStream, Source
from aki_megatron.data.shard_order import ShardOrder
from aki_megatron.data.shards import CaptionDataset
from aki_megatron.data.template import Template
from aki_megatron.synthetic.files import write_tar
from aki_megatron.types import Caption, Modality

VOCABULARY = """
a the of on in with and photograph street red blue small large wooden table window person dog sitting standing near
background sky light building green trees sign text reads left right two several white car evening glass
"""
WORDS_PER_CAPTION = 67
"""Words of a caption of BLIP3-KALE on average."""
MANY_STEPS = 1 << 40


def captions(number: int, *, seed: int = 0) -> list[str]:
    """Return synthetic captions."""
    rng = np.random.default_rng(seed)
    words = VOCABULARY.split()
    return [" ".join(rng.choice(words, WORDS_PER_CAPTION)) for _ in range(number)]


def jpegs(number: int, width: int, height: int, *, seed: int = 0) -> list[bytes]:
    """Return images with coarse and fine structures, as JPEG of quality 85: like photographs, 60 KB at 640 x 480."""
    rng = np.random.default_rng(seed)
    encoded = []
    for _ in range(number):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        fine = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        layers = [Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC) for layer in (coarse, fine)]
        written = io.BytesIO()
        Image.blend(layers[0], layers[1], 0.2).save(written, "JPEG", quality=85)
        encoded.append(written.getvalue())
    return encoded


@dataclass(frozen=True)
class SyntheticData:
    """The same images and captions twice: in tars, and as files of a folder."""

    tars: list[Path]
    files: list[Path]
    image_bytes: float
    """Mean size of a JPEG."""


def write_data(folder: Path, num_images: int, num_tars: int, width: int = 640, height: int = 480) -> SyntheticData:
    """Write images and captions both ways, as many into each tar."""
    images, texts = jpegs(num_images, width, height), captions(num_images)
    paths, files = [], []
    (folder / "files").mkdir(parents=True)
    for tar in range(num_tars):
        path = folder / f"{tar:05d}.tar"
        write_tar(path, ((f"{n:06d}", "jpg", images[n], texts[n]) for n in range(tar, num_images, num_tars)))
        paths.append(path)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        file = folder / "files" / f"{number:06d}.jpg"
        file.write_bytes(image)
        file.with_suffix(".txt").write_text(text)
        files.append(file)
    return SyntheticData(paths, files, sum(map(len, images)) / num_images)


Batches = Iterator[torch.Tensor]
"""Endless float32 [B, 3, S, S]."""


def our_loader(
    dataset: CaptionDataset, template: Template, *, size: int, batch_size: int, num_microbatches: int, num_workers: int
) -> StepLoader:
    """Return a pretraining run's loader over tars, with micro-batches of ``batch_size`` samples."""
    order = ShardOrder(dataset.counts, seed=0)
    source: Source[Caption] = Source(dataset, order=order)
    stream = MixtureStream({"captions": source}, Mixture({"captions": 1.0}, seed=0), template.render_caption,
                         decoders={Modality.IMAGE: ImageCache(size)})  # fmt: skip
    global_batch_size = batch_size * num_microbatches
    planner = BatchPlanner(
        [Phase(MANY_STEPS, stream)], global_batch_size=global_batch_size, micro_batch_size=batch_size
    )
    microbatches = MicrobatchDataset([stream], pad_id=template.tokenizer.pad_id, image_size=size, sequence_length=None)
    return StepLoader(planner, microbatches, bad_sample_budget=BadSampleBudget(0.0), num_workers=num_workers)


def ours(
    data: SyntheticData, template: Template, *, size: int, batch_size: int, num_microbatches: int, num_workers: int
) -> Batches:
    """Yield the batches of this project's loader."""
    dataset = CaptionDataset([str(tar) for tar in data.tars], data.tars[0].parent)
    loader = our_loader(
        dataset,
        template,
        size=size,
        batch_size=batch_size,
        num_microbatches=num_microbatches,
        num_workers=num_workers,
    )
    with closing(loader):
        for step in loader.steps(0):
            yield from (batch.media[Modality.IMAGE] for batch in step.batches)


@dataclass(frozen=True)
class Preprocessor:
    """What the other pipelines do with an encoded image and its text; picklable for their workers."""

    template: Template
    size: int

    def image(self, encoded: bytes) -> torch.Tensor:
        """Return float32 [3, S, S]."""
        return normalize([decode_image(encoded, self.size, key="")], self.size)[0]

    def tokens(self, text: bytes) -> list[int]:
        """Return the token ids of the caption."""
        sample = self.template.render_caption(Caption("", text.decode("utf-8"), b""))
        return sample.token_ids if sample is not None else []


def plain_webdataset(data: SyntheticData, preprocess: Preprocessor, *, batch_size: int, num_workers: int) -> Batches:
    """Yield the batches of the pipeline of webdataset's manual, not shuffled, tars dealt to the workers."""
    dataset = (
        webdataset.WebDataset([str(tar) for tar in data.tars], shardshuffle=False)
        .to_tuple("jpg", "txt")
        .map_tuple(preprocess.image, preprocess.tokens)
        .batched(batch_size, partial=False)
        .repeat()
    )
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=num_workers, multiprocessing_context=_fork(num_workers)
    )
    for pixels, _ in loader:
        yield pixels


class _Files(Dataset[tuple[torch.Tensor, list[int]]]):
    def __init__(self, files: Sequence[Path], preprocess: Preprocessor) -> None:
        self.files, self.preprocess = files, preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[int]]:
        file = self.files[index]
        return self.preprocess.image(file.read_bytes()), self.preprocess.tokens(file.with_suffix(".txt").read_bytes())


def _stack(members: Sequence[tuple[torch.Tensor, list[int]]]) -> tuple[torch.Tensor, list[list[int]]]:
    return torch.stack([pixels for pixels, _ in members]), [tokens for _, tokens in members]


def torch_files(data: SyntheticData, preprocess: Preprocessor, *, batch_size: int, num_workers: int) -> Batches:
    """Yield the batches of torch's DataLoader over a shuffled folder; its workers persist between epochs."""
    loader = DataLoader(
        _Files(data.files, preprocess),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=_stack,
        multiprocessing_context=_fork(num_workers),
    )
    while True:
        for pixels, _ in loader:
            yield pixels


def _fork(num_workers: int) -> str | None:
    return "fork" if num_workers else None


@dataclass(frozen=True)
class Speed:
    """Images per elapsed second, and per second of processor time of all processes together."""

    per_second: float
    per_core_second: float


def timed(start: Callable[[], Batches], *, num_warmup: int, num_measured: int) -> Speed:
    """Measure ``num_measured`` batches after ``num_warmup`` ones: a steady state, in which the consumer waits."""
    batches = start()
    try:
        for _ in range(num_warmup):
            next(batches)
        begin, processor = time.perf_counter(), processor_seconds()
        images = sum(len(next(batches)) for _ in range(num_measured))
        spent, used = time.perf_counter() - begin, processor_seconds() - processor
    finally:
        batches.close()  # type: ignore[attr-defined]  # a generator; ends its processes
    return Speed(images / spent, images / used)


def processor_seconds() -> float:
    """Return the processor time of this process and of its current worker processes, all threads."""
    ticks = 0
    for child in multiprocessing.active_children():
        # after the name, which may hold anything: fields 14 and 15 of proc(5), utime and stime
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
