"""Measure how much of packed sequences is padding, and how long packing takes, by block size and sequence length.

python tools/bench/packing.py                                   # synthetic lengths after the papers' datasets
python tools/bench/packing.py --config configs/demo/sft.yaml    # and the lengths of a run's own data
python tools/bench/packing.py --json packing.json               # also as a list of objects

pretrain   captions of 67 words on average (KALE), at most 128 text tokens, 144 image positions
finetune   11 fine-tuning sources with the papers' weights (Table 4), at most 512 text tokens, 144 image positions; a
           system message of 31 tokens, half of ScienceQA without an image, LLaVA's conversations as single turns
narrow     all lengths near 234, which is just between 17 and 18 to a sequence of 4096
bound      the padding of the fewest sequences that could hold each block: a lower bound
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aki_megatron.config.load import load_run
from aki_megatron.console import Console, Table
from aki_megatron.data.mixture import Mixture
from aki_megatron.data.packing import PackingLimits, min_num_sequences, pack
from aki_megatron.data.pipeline import build_template, build_tokenizer
from aki_megatron.data.sources import open_sources

Lengths = tuple[np.ndarray, np.ndarray]
"""Positions and images of many samples, in the order of training."""

NUM_IMAGE_TOKENS = 144
SYSTEM_TOKENS = 40
"""Text tokens of every conversation: markers, <image>, and the papers' system message."""

FINETUNE = (
    # weight, mean and standard deviation of the tokens after the system message: instruction, question, options, answer
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
    """Return lengths like KALE's: 67 words on average, 1.35 tokens a word, 4 markers, truncated at 128."""
    words = np.random.default_rng(seed).gamma((67 / 25) ** 2, 25**2 / 67, samples)
    text = np.clip(np.rint(1.35 * words) + 4, 5, 128)
    return text.astype(np.int64) + NUM_IMAGE_TOKENS - 1, np.ones(samples, np.int64)


def finetune_lengths(samples: int, *, seed: int = 0) -> Lengths:
    """Return lengths like those of the papers' 11 sources, truncated at 512."""
    rng = np.random.default_rng(seed)
    _, weights, means, deviations = zip(*FINETUNE, strict=True)
    source = rng.choice(len(FINETUNE), samples, p=np.array(weights) / sum(weights))
    mean, deviation = np.array(means)[source], np.array(deviations)[source]
    text = np.clip(np.rint(SYSTEM_TOKENS + rng.gamma((mean / deviation) ** 2, deviation**2 / mean)), 1, 512)
    images = ((source != [row[0] for row in FINETUNE].index("scienceqa")) | (rng.random(samples) < 0.5)).astype(
        np.int64
    )
    return text.astype(np.int64) + images * (NUM_IMAGE_TOKENS - 1), images


def narrow_lengths(samples: int, *, seed: int = 0) -> Lengths:
    """Return normally distributed lengths, mean 234 and standard deviation 8."""
    lengths = np.rint(np.random.default_rng(seed).normal(234, 8, samples)).astype(np.int64)
    return lengths, np.ones(samples, np.int64)


def run_lengths(file: Path, samples: int) -> Lengths:
    """Return the lengths of the first samples of a fine-tuning run, in the mixture's order."""
    config = load_run([], default_config=file, prog="packing", description="")
    data = config.data
    template = build_template(config, build_tokenizer(config))
    mixture = Mixture({source.name: source.weight for source in data.sources}, seed=config.train.seed)
    sources = open_sources(data.root, list(mixture.names), "train")
    rows = []
    for number in range(samples):
        draw = mixture.draw(number)
        source = sources[mixture.names[draw.source]]
        conversation = source[mixture.item_index(draw.source, draw.draw_index, len(source))]
        sample = template.render_conversation(conversation)
        if sample is not None:
            rows.append((len(sample.token_ids), len(sample.media)))
    lengths, images = np.array(rows).T
    return lengths, images


def measure(lengths: Lengths, block: int, limits: PackingLimits) -> dict[str, float]:
    """Return padding in percent over whole blocks, its bound, and processor milliseconds and sequences per block."""
    sequences = bound = tokens = 0
    blocks = max(1, len(lengths[0]) // block)
    start = time.process_time()
    for number in range(blocks):
        size, images = (column[number * block : (number + 1) * block].tolist() for column in lengths)
        sequences += len(pack(size, images, limits))
        bound += min_num_sequences(size, images, limits)
        tokens += sum(size)
    spent = time.process_time() - start
    percent = 100 / limits.sequence_length
    return {
        "padding": 100 - percent * tokens / sequences,
        "bound": 100 - percent * tokens / bound,
        "milliseconds": 1000 * spent / blocks,
        "sequences": sequences / blocks,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a fine-tuning run whose data is measured too")
    parser.add_argument("--sequence_length", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--max_images", type=int, default=1 << 20, help="most images of a sequence (default: no limit)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--samples", type=int, default=16384, help="samples packed per measurement")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    kinds = {
        "pretrain": pretrain_lengths(options.samples),
        "finetune": finetune_lengths(options.samples),
        "narrow": narrow_lengths(options.samples),
    }
    if options.config:
        kinds[str(options.config)] = run_lengths(options.config, options.samples)
    table = Table("lengths", "mean", "length", "block", "sequences", "padding %", "bound %", "ms")
    results = []
    for name, lengths in kinds.items():
        for sequence_length in options.sequence_length:
            for block in options.blocks:
                found = measure(lengths, block, PackingLimits(sequence_length, options.max_images))
                mean = float(lengths[0].mean())
                results.append(
                    {"lengths": name, "mean": mean, "sequence_length": sequence_length, "block": block, **found}
                )
                figures = (
                    f"{found[key]:.{digits}f}" for key, digits in (("padding", 2), ("bound", 2), ("milliseconds", 1))
                )
                table.add_row(
                    name, f"{mean:.0f}", str(sequence_length), str(block), f"{found['sequences']:.1f}", *figures
                )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
