"""How much of packed rows is padding, and how long packing takes, by block and row size.

python tools/bench/packing.py                                   # made-up lengths after the papers' datasets
python tools/bench/packing.py --config configs/demo/sft.yaml    # and the lengths of a run's own data
python tools/bench/packing.py --json packing.json               # also as a list of objects

pretrain   captions of 67 words on average (KALE), at most 128 text tokens, 144 image places
finetune   11 fine-tuning sources in the papers' shares (Table 4), at most 512 text tokens, 144 image places; a
           system message of 31 tokens, half of ScienceQA without an image, LLaVA's dialogues as single turns
narrow     all lengths near 234, which is just between 17 and 18 to a row of 4096
bound      the padding of the fewest rows that could hold each block: nothing can be below it
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from aki_megatron.config.load import load_run
from aki_megatron.data.mixture import Mixture
from aki_megatron.data.packing import Limits, fewest_rows, pack
from aki_megatron.data.pipeline import build_template, build_tokenizer
from aki_megatron.data.sources import open_sources

Lengths = tuple[np.ndarray, np.ndarray]
"""Places and images of many samples, in the order of training."""

IMAGE_TOKENS = 144
OPENING = 40
"""Text tokens of every conversation: markers, <image>, and the papers' system message."""

FINETUNE = (
    # share, mean and deviation of the text after the opening: instruction, question, options, answer
    ("vqav2", 0.103, 22, 2.5),
    ("gqa", 0.103, 24, 4),
    ("vsr", 0.026, 30, 2.5),
    ("ocrvqa", 0.103, 26, 5),
    ("aokvqa", 0.103, 54, 8),
    ("scienceqa", 0.103, 90, 60),
    ("refcoco", 0.309, 51, 2.5),
    ("visualgenome", 0.047, 53, 2.5),
    ("llava conversation", 0.072, 60, 30),
    ("llava detail", 0.007, 155, 40),
    ("llava reasoning", 0.024, 185, 50),
)


def pretrain_lengths(samples: int, *, seed: int = 0) -> Lengths:
    """KALE: 67 words on average, 1.35 tokens a word, 4 markers, cut at 128."""
    words = np.random.default_rng(seed).gamma((67 / 25) ** 2, 25**2 / 67, samples)
    text = np.clip(np.rint(1.35 * words) + 4, 5, 128)
    return text.astype(np.int64) + IMAGE_TOKENS - 1, np.ones(samples, np.int64)


def finetune_lengths(samples: int, *, seed: int = 0) -> Lengths:
    """The mixture of the papers' 11 sources, cut at 512."""
    rng = np.random.default_rng(seed)
    _, shares, means, deviations = zip(*FINETUNE, strict=True)
    source = rng.choice(len(FINETUNE), samples, p=np.array(shares) / sum(shares))
    mean, deviation = np.array(means)[source], np.array(deviations)[source]
    text = np.clip(np.rint(OPENING + rng.gamma((mean / deviation) ** 2, deviation**2 / mean)), 1, 512)
    images = ((source != [row[0] for row in FINETUNE].index("scienceqa")) | (rng.random(samples) < 0.5)).astype(
        np.int64
    )
    return text.astype(np.int64) + images * (IMAGE_TOKENS - 1), images


def narrow_lengths(samples: int, *, seed: int = 0) -> Lengths:
    """A normal distribution around 234 with a deviation of 8."""
    lengths = np.rint(np.random.default_rng(seed).normal(234, 8, samples)).astype(np.int64)
    return lengths, np.ones(samples, np.int64)


def run_lengths(file: Path, samples: int) -> Lengths:
    """The first samples of a fine-tuning run's own data, in the mixture's order."""
    config = load_run([], default_config=file, prog="packing", description="")
    data = config.data
    template = build_template(config, build_tokenizer(config))
    mixture = Mixture({source.name: source.weight for source in data.sources}, seed=config.train.seed)
    sources = open_sources(data.root, list(mixture.names), "train")
    rows = []
    for number in range(samples):
        draw = mixture.draw(number)
        source = sources[mixture.names[draw.source]]
        conversation = source[mixture.element(draw.source, draw.visit, len(source))]
        sample = template.render_conversation(conversation)
        if sample is not None:
            rows.append((len(sample.token_ids), int(conversation.image is not None)))
    lengths, images = np.array(rows).T
    return lengths, images


def measured(lengths: Lengths, block: int, limits: Limits) -> dict[str, float]:
    """Padding in percent over whole blocks, its bound, milliseconds of processor time for a block, rows of a block."""
    rows = bound = tokens = 0
    blocks = max(1, len(lengths[0]) // block)
    start = time.process_time()
    for number in range(blocks):
        size, images = (column[number * block : (number + 1) * block].tolist() for column in lengths)
        rows += len(pack(size, images, limits))
        bound += fewest_rows(size, images, limits)
        tokens += sum(size)
    spent = time.process_time() - start
    places = 100 / limits.sequence_length
    return {
        "padding": 100 - places * tokens / rows,
        "bound": 100 - places * tokens / bound,
        "milliseconds": 1000 * spent / blocks,
        "rows": rows / blocks,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a fine-tuning run whose data is measured too")
    parser.add_argument("--sequence_length", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--max_images", type=int, default=1 << 20, help="most images of a row (default: no limit)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--samples", type=int, default=16384, help="samples packed for every figure")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    kinds = {
        "pretrain": pretrain_lengths(options.samples),
        "finetune": finetune_lengths(options.samples),
        "narrow": narrow_lengths(options.samples),
    }
    if options.config:
        kinds[str(options.config)] = run_lengths(options.config, options.samples)
    table = Table("lengths", "mean", "row", "block", "rows", "padding %", "bound %", "ms per block")
    results = []
    for name, lengths in kinds.items():
        for sequence_length in options.sequence_length:
            for block in options.blocks:
                found = measured(lengths, block, Limits(sequence_length, options.max_images))
                mean = float(lengths[0].mean())
                results.append(
                    {"lengths": name, "mean": mean, "sequence_length": sequence_length, "block": block, **found}
                )
                figures = (
                    f"{found[key]:.{digits}f}" for key, digits in (("padding", 2), ("bound", 2), ("milliseconds", 1))
                )
                table.add_row(name, f"{mean:.0f}", str(sequence_length), str(block), f"{found['rows']:.1f}", *figures)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
