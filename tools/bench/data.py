"""How fast data becomes batches: decoding, tokenizing, packing, starting on many tars, resuming far inside.

    python tools/bench/data.py                          # everything, about a minute and a half
    python tools/bench/data.py --parts loading --seconds 120
    python tools/bench/data.py --json data.json         # also as a list of objects

loading   JPEGs of 640 x 480, drawn into tars and files, decoded and resized to 384 x 384, their captions tokenized: our
          loader, a plain webdataset pipeline, and torch's DataLoader over the files, with 0, 1 and 2 workers. The three
          take turns; speeds are medians over the turns, and so are the ratios of two speeds of one turn. Images per
          core are per second of processor time of all processes, which other programs disturb least.
text      rendering and tokenizing captions and conversations, tokens per second of processor time, one core.
packing   share of the places of packed rows that hold a token, lengths made up after the papers' datasets.
start     opening 10,000 tars of 10,000 samples each (one real tar under 10,000 names), without and with the manifest
          that the first start leaves; then a run that goes on at sample 50,000,000 of these 100,000,000: seconds until
          its first batch. Files are in the memory of the operating system: a network disk adds its latency.
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
from data_cases import Drawn, Read, Speed, captions, draw, jpegs, our_loader, ours, plain_webdataset, timed, torch_files
from made_up_shards import link_copies
from packing import finetune_lengths, measured, pretrain_lengths
from rich.console import Console
from rich.table import Table

from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.data.chat import CHATS
from aki_megatron.data.packing import BLOCK_SAMPLES, Limits
from aki_megatron.data.shards import ShardIndex
from aki_megatron.data.tar_index import write_index
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.synthetic.demo_tokenizer import write_tokenizer
from aki_megatron.synthetic.writers import write_tar
from aki_megatron.types import Caption, Conversation, Turn

PARTS = ("loading", "text", "packing", "start")
SIZE = 384
BATCH, MICROS = 16, 4
IMAGE_TOKENS = 144
PICTURES, TARS = 512, 8
ROW_IMAGES = 32

Row = dict[str, Any]


def loading(folder: Path, template: Template, seconds: float, workers: Sequence[int]) -> list[Row]:
    """Turns of all ways to load, until the time is over; two turns at least."""
    drawn = draw(folder, PICTURES, TARS)
    turns: dict[tuple[str, int], list[Speed]] = {}
    begin = time.perf_counter()
    number = 0
    while number < 2 or (time.perf_counter() - begin) * (number + 1) / number < seconds:
        for count in workers:
            for name, start in contenders(drawn, template, count).items():
                speed = timed(start, warm=MICROS, measured=3 * MICROS)
                turns.setdefault((name, count), []).append(speed)
        number += 1
    rows: list[Row] = []
    for (name, count), speeds in turns.items():
        own = turns["ours", count]
        rows.append({
            "part": "loading",
            "what": name,
            "workers": count,
            "images_per_second": round(statistics.median(speed.per_second for speed in speeds), 1),
            "images_per_core_second": round(statistics.median(speed.per_core_second for speed in speeds), 1),
            "ours_over_this": _ratio(own, speeds, "per_second"),
            "ours_over_this_per_core": _ratio(own, speeds, "per_core_second"),
            "turns": number,
            "jpeg_kib": round(drawn.picture_bytes / 1024, 1),
        })  # fmt: skip
    return rows


def contenders(drawn: Drawn, template: Template, workers: int) -> dict[str, Callable[[], Any]]:
    """What takes turns."""
    read = Read(template, SIZE)
    return {
        "ours": partial(ours, drawn, template, size=SIZE, batch=BATCH, micros=MICROS, workers=workers),
        "webdataset": partial(plain_webdataset, drawn, read, batch=BATCH, workers=workers),
        "torch files": partial(torch_files, drawn, read, batch=BATCH, workers=workers),
    }


def _ratio(own: Sequence[Speed], other: Sequence[Speed], field: str) -> float:
    turns = zip(own, other, strict=True)
    return round(statistics.median(getattr(a, field) / getattr(b, field) for a, b in turns), 3)


def text(template: Template, number: int = 1000) -> list[Row]:
    """Tokens per second of one core."""
    texts = captions(number, seed=1)
    whole = [Caption(f"captions/{n}", text, b"") for n, text in enumerate(texts)]
    turns = [(Turn(f"{text[:80]}?", text[80:240]),) for text in texts]
    dialogues = [Conversation(f"dialogues/{n}", turn, b"") for n, turn in enumerate(turns)]
    rows: list[Row] = []
    for what, render in (
        ("captions", lambda: [template.render_caption(one) for one in whole]),
        ("conversations", lambda: [template.render_conversation(one) for one in dialogues]),
    ):
        begin = time.process_time()
        samples = render()
        spent = time.process_time() - begin
        # image places are not tokenized
        tokens = sum(len(sample.token_ids) - IMAGE_TOKENS + 1 for sample in samples if sample is not None)
        figures = {"tokens_per_core_second": round(tokens / spent), "samples_per_core_second": round(number / spent)}
        rows.append({"part": "text", "what": what, **figures})
    return rows


def packing(samples: int = 4 * BLOCK_SAMPLES) -> list[Row]:
    """Share of real places, and what the dealing costs."""
    rows: list[Row] = []
    for what, lengths in (("pretraining", pretrain_lengths(samples)), ("fine-tuning", finetune_lengths(samples))):
        for sequence_length in (2048, 4096, 8192):
            found = measured(lengths, BLOCK_SAMPLES, Limits(sequence_length, ROW_IMAGES * sequence_length // 4096))
            real, cost = round(1 - found["padding"] / 100, 4), round(1000 * found["milliseconds"] / BLOCK_SAMPLES, 1)
            figures = {"sequence_length": sequence_length, "real_share": real, "microseconds_per_sample": cost}
            rows.append({"part": "packing", "what": what, **figures})
    return rows


def start(folder: Path, template: Template, tars: int, per_tar: int) -> list[Row]:
    """Start on many tars, then go on in the middle of the first pass."""
    folder.mkdir()
    images, texts = jpegs(16, 64, 48), captions(16)
    first = folder / "00000.tar"
    members = ((f"{n:06d}", "jpg", images[n % 16], texts[n % 16]) for n in range(per_tar))
    write_tar(first, members)
    begin = time.perf_counter()
    write_index(first)
    indexing = time.perf_counter() - begin
    pattern = [link_copies(first, tars)]
    rows: list[Row] = [{"part": "start", "what": f"indexing a tar of {per_tar:,}", "seconds": round(indexing, 3)}]
    for what in ("first start, no manifest", "later start"):
        begin = time.perf_counter()
        index = ShardIndex(pattern, folder)
        rows.append(
            {"part": "start", "what": f"{what}: {tars:,} tars", "seconds": round(time.perf_counter() - begin, 3)}
        )
    begin = time.perf_counter()
    index = ShardIndex(pattern, folder)
    loader = our_loader(index, template, size=SIZE, batch=BATCH, micros=1, workers=0)
    middle = len(index) // 2
    step = next(loader.steps(middle // BATCH))
    spent = time.perf_counter() - begin
    loader.close()
    assert step.samples == BATCH
    what = f"resume at sample {middle:,} of {len(index):,}, first batch of {BATCH}"
    rows.append({"part": "start", "what": what, "seconds": round(spent, 3)})
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    """A table for each part."""
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
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {PARTS}")
    parser.add_argument("--seconds", type=float, default=60, help="for the turns of loading; default: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loading; default: %(default)s")
    parser.add_argument("--tars", type=int, default=10_000, help="start; default: %(default)s")
    parser.add_argument("--per_tar", type=int, default=10_000, help="samples of each; default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, help="a folder of Phi-3's family; default: the demo's, made now")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.tokenizer is None:
            write_tokenizer(folder / "tokenizer")
        tokenizer = Tokenizer(arguments.tokenizer or folder / "tokenizer", CHATS["phi3"])
        template = Template(tokenizer, IMAGE_TOKENS, 512, SYSTEM_MESSAGE)
        load = os.getloadavg()[0]
        for part, measure in (
            ("loading", partial(loading, folder / "drawn", template, arguments.seconds, arguments.workers)),
            ("text", partial(text, template)),
            ("packing", packing),
            ("start", partial(start, folder / "many", template, arguments.tars, arguments.per_tar)),
        ):
            if part in arguments.parts:
                rows += measure()
    cores = len(os.sched_getaffinity(0))
    console = Console()
    show(rows, console)
    console.print(f"{cores} cores, load {load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
