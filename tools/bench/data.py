"""Measure how fast data becomes batches: decoding, tokenizing, packing, starting on many tars, resuming far inside.

    python tools/bench/data.py                          # everything, about a minute and a half
    python tools/bench/data.py --parts loading --seconds 120
    python tools/bench/data.py --json data.json         # also as a list of objects

loading   synthetic JPEGs of 640 x 480 in tars and files, decoded and resized to 384 x 384, their captions tokenized:
          our loader, a plain webdataset pipeline, and torch's DataLoader over the files, with 0, 1 and 2 workers. The
          three alternate; speeds are medians over the repeats, and so are the ratios of two speeds of one repeat.
          Images per core are per second of processor time of all processes, which other programs disturb least.
text      rendering and tokenizing captions and conversations, tokens per second of processor time, one core.
packing   fraction of the positions of packed sequences that hold a token, synthetic lengths after the papers' datasets.
start     opening 10,000 tars of 10,000 samples each (one real tar under 10,000 names), without and with the manifest
          that the first start leaves; then a run that goes on at sample 50,000,000 of these 100,000,000: seconds until
          its first batch. Files are in the page cache: a network disk adds its latency.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data_cases import (
    Preprocessor,
    Speed,
    SyntheticData,
    captions,
    jpegs,
    our_loader,
    ours,
    plain_webdataset,
    timed,
    torch_files,
    write_data,
)
from packing import finetune_lengths, measure, pretrain_lengths
from synthetic_shards import link_copies

from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.console import Console, Table
from aki_megatron.data.packing import DEFAULT_BUFFER_SIZE, PackingLimits
from aki_megatron.data.shards import CaptionDataset
from aki_megatron.data.tar_index import write_index
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.families.registry import FAMILIES
from aki_megatron.synthetic.demo_tokenizer import write_tokenizer
from aki_megatron.synthetic.files import write_tar
from aki_megatron.types import Caption, Conversation, Modality, Turn, image_items

PARTS = ("loading", "text", "packing", "start")
SIZE = 384
BATCH_SIZE, NUM_MICROBATCHES = 16, 4
NUM_IMAGE_TOKENS = 144
NUM_IMAGES, NUM_TARS = 512, 8
MAX_IMAGES = 32
"""Of a sequence of 4096 positions."""

Row = dict[str, Any]


def loading(folder: Path, template: Template, seconds: float, num_workers: Sequence[int]) -> list[Row]:
    """Measure all loaders in turn until the time is over; two repeats at least."""
    data = write_data(folder, NUM_IMAGES, NUM_TARS)
    repeats: dict[tuple[str, int], list[Speed]] = {}
    begin = time.perf_counter()
    number = 0
    while number < 2 or (time.perf_counter() - begin) * (number + 1) / number < seconds:
        for count in num_workers:
            for name, start in loaders(data, template, count).items():
                speed = timed(start, num_warmup=NUM_MICROBATCHES, num_measured=3 * NUM_MICROBATCHES)
                repeats.setdefault((name, count), []).append(speed)
        number += 1
    rows: list[Row] = []
    for (name, count), speeds in repeats.items():
        own = repeats["ours", count]
        rows.append({
            "part": "loading",
            "what": name,
            "workers": count,
            "images_per_second": round(statistics.median(speed.per_second for speed in speeds), 1),
            "images_per_core_second": round(statistics.median(speed.per_core_second for speed in speeds), 1),
            "ours_over_this": _ratio(own, speeds, "per_second"),
            "ours_over_this_per_core": _ratio(own, speeds, "per_core_second"),
            "repeats": number,
            "jpeg_kib": round(data.image_bytes / 1024, 1),
        })  # fmt: skip
    return rows


def loaders(data: SyntheticData, template: Template, num_workers: int) -> dict[str, Callable[[], Any]]:
    """Return the loaders to compare."""
    preprocess = Preprocessor(template, SIZE)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "num_workers": num_workers}
    return {
        "ours": partial(ours, data, template, size=SIZE, num_microbatches=NUM_MICROBATCHES, **options),
        "webdataset": partial(plain_webdataset, data, preprocess, **options),
        "torch files": partial(torch_files, data, preprocess, **options),
    }


def _ratio(own: Sequence[Speed], other: Sequence[Speed], field: str) -> float:
    pairs = zip(own, other, strict=True)
    return round(statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs), 3)


def text(template: Template, number: int = 1000) -> list[Row]:
    """Measure tokens per second of one core."""
    texts = captions(number, seed=1)
    all_captions = [Caption(f"captions/{n}", text, b"") for n, text in enumerate(texts)]
    turns = [(Turn(f"{text[:80]}?", text[80:240]),) for text in texts]
    conversations = [Conversation(f"conversations/{n}", turn, image_items(b"")) for n, turn in enumerate(turns)]
    rows: list[Row] = []
    for what, render in (
        ("captions", lambda: [template.render_caption(one) for one in all_captions]),
        ("conversations", lambda: [template.render_conversation(one) for one in conversations]),
    ):
        begin = time.process_time()
        samples = render()
        spent = time.process_time() - begin
        # image positions are not tokenized
        tokens = sum(len(sample.token_ids) - NUM_IMAGE_TOKENS + 1 for sample in samples if sample is not None)
        figures = {"tokens_per_core_second": round(tokens / spent), "samples_per_core_second": round(number / spent)}
        rows.append({"part": "text", "what": what, **figures})
    return rows


def packing(samples: int = 4 * DEFAULT_BUFFER_SIZE) -> list[Row]:
    """Measure the fraction of real positions, and the time of packing."""
    rows: list[Row] = []
    for what, lengths in (("pretraining", pretrain_lengths(samples)), ("fine-tuning", finetune_lengths(samples))):
        for sequence_length in (2048, 4096, 8192):
            limits = PackingLimits(sequence_length, MAX_IMAGES * sequence_length // 4096)
            found = measure(lengths, DEFAULT_BUFFER_SIZE, limits)
            real = round(1 - found["padding"] / 100, 4)
            cost = round(1000 * found["milliseconds"] / DEFAULT_BUFFER_SIZE, 1)
            figures = {"sequence_length": sequence_length, "real_fraction": real, "microseconds_per_sample": cost}
            rows.append({"part": "packing", "what": what, **figures})
    return rows


def start(folder: Path, template: Template, num_tars: int, per_tar: int) -> list[Row]:
    """Measure a start on many tars, then a resume in the middle of the first epoch."""
    folder.mkdir()
    images, texts = jpegs(16, 64, 48), captions(16)
    first = folder / "00000.tar"
    members = ((f"{n:06d}", "jpg", images[n % 16], texts[n % 16]) for n in range(per_tar))
    write_tar(first, members)
    begin = time.perf_counter()
    write_index(first)
    indexing = time.perf_counter() - begin
    pattern = [link_copies(first, num_tars)]
    rows: list[Row] = [{"part": "start", "what": f"indexing a tar of {per_tar:,}", "seconds": round(indexing, 3)}]
    for what in ("first start, no manifest", "later start"):
        begin = time.perf_counter()
        dataset = CaptionDataset(pattern, folder)
        rows.append(
            {"part": "start", "what": f"{what}: {num_tars:,} tars", "seconds": round(time.perf_counter() - begin, 3)}
        )
    begin = time.perf_counter()
    dataset = CaptionDataset(pattern, folder)
    loader = our_loader(dataset, template, size=SIZE, batch_size=BATCH_SIZE, num_microbatches=1, num_workers=0)
    middle = len(dataset) // 2
    step = next(loader.steps(middle // BATCH_SIZE))
    spent = time.perf_counter() - begin
    loader.close()
    assert step.num_samples == BATCH_SIZE
    what = f"resume at sample {middle:,} of {len(dataset):,}, first batch of {BATCH_SIZE}"
    rows.append({"part": "start", "what": what, "seconds": round(spent, 3)})
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    """Print a table for each part."""
    for part in PARTS:
        own = [row for row in rows if row["part"] == part]
        if not own:
            continue
        columns = [name for name in own[0] if name != "part"]
        table = Table(*(name.replace("_", " ") for name in columns), title=part)
        for row in own:
            table.add_row(*(f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in columns))
        console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {PARTS}")
    parser.add_argument("--seconds", type=float, default=60, help="for the part loading; default: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loading; default: %(default)s")
    parser.add_argument("--tars", type=int, default=10_000, help="start; default: %(default)s")
    parser.add_argument("--per_tar", type=int, default=10_000, help="samples of each; default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, help="a folder of Phi-3's family; default: the demo's, built now")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.tokenizer is None:
            write_tokenizer(folder / "tokenizer")
        tokenizer = Tokenizer(arguments.tokenizer or folder / "tokenizer", FAMILIES["phi3"].chat)
        template = Template(tokenizer, {Modality.IMAGE: NUM_IMAGE_TOKENS}, 512, SYSTEM_MESSAGE)
        load = os.getloadavg()[0]
        for part, run in (
            ("loading", partial(loading, folder / "loading", template, arguments.seconds, arguments.workers)),
            ("text", partial(text, template)),
            ("packing", packing),
            ("start", partial(start, folder / "many", template, arguments.tars, arguments.per_tar)),
        ):
            if part in arguments.parts:
                rows += run()
    cores = len(os.sched_getaffinity(0))
    console = Console()
    show(rows, console)
    console.print(f"{cores} cores, load {load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
