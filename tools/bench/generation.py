"""Measure answers per second against transformers' generate on the exported folder: same weights, prompts and machine.

    python tools/bench/generation.py                    # 64 questions, a model of 14 million parameters, float32
    python tools/bench/generation.py --hidden_size 1024 --layers 12 --json generation.json

single   questions one by one, answers of 4 to 64 tokens
mixed    all questions at once, as the benchmarks' columns mix them: three of four answers are a word or a letter (1 to
         4 tokens), the others are sentences (16 to 64)
uniform  all questions at once, answers of 4 to 64 tokens

Of several questions, ours joins the next prompt as soon as an answer has ended; transformers gets batches of the same
size and ends each with its longest answer.

Both sides are run in turns, ``--rounds`` times after one that does not count. A ratio is the median over the rounds of
transformers' time divided by ours in the same round: ``wall`` of elapsed time, ``CPU`` of processor time, which other
programs on the machine disturb less. The new tokens are compared. Weights are random, so an answer's length is drawn
and given to both. Exits with 1 where tokens differ, and with 2 below ``--min_single`` or ``--min_mixed``.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from aki_megatron.checkpoint.hf_export import export
from aki_megatron.checkpoint.tensors import LazyTensors, TensorSpec
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.console import Console, Table
from aki_megatron.data.collate import collate
from aki_megatron.evaluate.answering import Answerer, Request
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE, DecodedImage, Modality, Sample, image_items

LATENTS, IMAGE_SIZE, VOCAB_SIZE, IMAGE_ID, PAD_ID = 36, 32, 4096, 4096, 0


class Tokens:
    """Tokens without a text; no token ends an answer, because lengths are drawn."""

    pad_id = PAD_ID
    stop_ids = ()

    def decode(self, ids: Sequence[int]) -> str:
        """Return nothing: only tokens are compared."""
        return ""


def build(hidden_size: int, layers: int) -> Stage:
    """Build a model with random weights."""
    heads = max(1, hidden_size // 64)
    config = ModelConfig(
        vision=VisionConfig(
            image_size=IMAGE_SIZE, patch_size=8, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128
        ),
        resampler=ResamplerConfig(num_latents=LATENTS, num_layers=2, num_heads=2, head_dim=32),
        decoder=DecoderConfig(
            family="llama",
            hidden_size=hidden_size,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            intermediate_size=hidden_size * 8 // 3 // 8 * 8,
            padded_vocab_size=VOCAB_SIZE + 64,
            vocab_size=VOCAB_SIZE,
            num_added_tokens=2,
            lm_head_bias=False,
            rope=RopeConfig(max_position_embeddings=4096),
        ),
    )
    return build_model(config, attention=AttentionConfig(rule="mma"), seed=1).eval()


def draw_questions(count: int, max_new_tokens: int, *, mixed: bool = False) -> list[tuple[Sample, int]]:
    """Draw prompts (an image in three of four) and the length of each answer.

    mixed  three of four answers are short; otherwise lengths are uniform
    """
    rng, questions = random.Random(0), []
    for number in range(count):
        text = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(8, 96))]
        with_image = number % 4 != 3
        tokens = [*text[:4], *[IMAGE_ID] * (LATENTS * with_image), *text[4:]]
        kinds = [int(Modality.IMAGE if token == IMAGE_ID else Modality.TEXT) for token in tokens]
        image = DecodedImage(rng.randbytes(3 * IMAGE_SIZE**2), IMAGE_SIZE) if with_image else None
        sample = Sample(f"question {number}", tokens, kinds, [IGNORE] * len(tokens), image_items(image))
        least, most = (4, max_new_tokens)
        if mixed:
            least, most = (1, 4) if rng.random() < 0.75 else (max_new_tokens // 4, max_new_tokens)
        questions.append((sample, rng.randint(least, most)))
    return questions


def export_stage(stage: Stage, folder: Path) -> None:
    """Write the folder that transformers loads."""
    weights = {name: tensor.detach() for name, tensor in stage.state_dict().items()}
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    source = LazyTensors(specs, {name: (lambda tensor=tensor: tensor) for name, tensor in weights.items()})  # type: ignore[misc]
    export(source, stage.config, stage.attention, None, folder)


def answer_with_ours(stage: Stage, questions: Sequence[tuple[Sample, int]], batch_size: int) -> list[list[int]]:
    """Answer with the queue of aki_megatron.evaluate.answering."""
    requests = [Request(sample, max_new_tokens=length) for sample, length in questions]
    Answerer(stage, Tokens(), max_sequences=batch_size).answer(requests)
    return [request.tokens for request in requests]


@torch.no_grad()
def answer_with_transformers(
    model: torch.nn.Module, questions: Sequence[tuple[Sample, int]], batch_size: int
) -> list[list[int]]:
    """Answer in batches, padded on the left, each until its longest answer is complete."""
    answers = []
    for first in range(0, len(questions), batch_size):
        group = questions[first : first + batch_size]
        batch = collate([[sample] for sample, _ in group], pad_id=PAD_ID, image_size=IMAGE_SIZE)
        lengths = [len(sample.token_ids) for sample, _ in group]
        longest = max(lengths)

        def left(values: torch.Tensor, lengths: Sequence[int] = lengths, longest: int = longest) -> torch.Tensor:
            rows = (row.roll(longest - length) for row, length in zip(values, lengths, strict=True))
            return torch.stack(list(rows))

        modality = left(batch.modality_ids.long())
        inputs = {"input_ids": left(batch.token_ids), "attention_mask": (modality != Modality.PAD).long()}
        inputs["modality_ids"] = modality
        if batch.num_items(Modality.IMAGE):
            inputs["pixel_values"] = batch.media[Modality.IMAGE]
        most = max(length for _, length in group)
        out = model.generate(  # type: ignore[operator]
            **inputs, do_sample=False, max_new_tokens=most, eos_token_id=None, pad_token_id=PAD_ID
        )
        answers += [row[longest : longest + length].tolist() for row, (_, length) in zip(out, group, strict=True)]
    return answers


class Timer:
    """Elapsed seconds and seconds of the processor, round by round."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def run(self, answer: Callable[..., list[list[int]]], *arguments: object) -> list[list[int]]:
        """Return what ``answer`` returns, and keep the time that it takes."""
        wall, cpu = time.perf_counter(), time.process_time()
        answers = answer(*arguments)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return answers


def compare(
    stage: Stage, model: torch.nn.Module, questions: Sequence[tuple[Sample, int]], batch_size: int, rounds: int
) -> tuple[dict[str, float], int]:
    """Return the figures of both sides, and in how many rounds their tokens differed."""
    ours, external, different = Timer(), Timer(), 0
    for _ in range(rounds + 1):
        mine = ours.run(answer_with_ours, stage, questions, batch_size)
        different += mine != external.run(answer_with_transformers, model, questions, batch_size)
    figures = {"questions": float(len(questions)), "batch_size": float(batch_size)}
    for name in ("wall", "cpu"):
        pairs = list(zip(getattr(ours, name)[1:], getattr(external, name)[1:], strict=True))
        ratios = [second / first for first, second in pairs]
        figures |= {
            f"{name}_ours": len(questions) / statistics.median(first for first, _ in pairs),
            f"{name}_transformers": len(questions) / statistics.median(second for _, second in pairs),
            f"{name}_ratio": statistics.median(ratios),
            f"{name}_lowest_ratio": min(ratios),
        }
    return figures, different


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16, help="sequences at a time of both sides in the queue")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min_single", type=float, default=1.0, help="least CPU ratio (default %(default)s)")
    parser.add_argument("--min_mixed", type=float, default=2.0, help="least CPU ratio (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)
    console, figures, different = Console(), {}, 0
    stage = build(arguments.hidden_size, arguments.layers)
    questions, most = arguments.questions, arguments.max_new_tokens
    uniform, mixed = (draw_questions(questions, most, mixed=each) for each in (False, True))
    with tempfile.TemporaryDirectory() as folder:
        export_stage(stage, Path(folder))
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
        for name, batch_size, chosen in (
            ("single", 1, uniform[: max(1, questions // 4)]),
            ("mixed", arguments.batch_size, mixed),
            ("uniform", arguments.batch_size, uniform),
        ):
            figures[name], num_different = compare(stage, model, chosen, batch_size, arguments.rounds)
            different += num_different
    number = sum(parameter.numel() for parameter in stage.parameters())
    title = f"answers per second, greedy, {number / 1e6:.0f} million parameters, median of {arguments.rounds} rounds"
    table = Table("", "batch", "ours", "transformers", "ratio (wall)", "ratio (CPU)", "lowest (CPU)", title=title)
    for name, found in figures.items():
        cells = [
            found[key] for key in ("wall_ours", "wall_transformers", "wall_ratio", "cpu_ratio", "cpu_lowest_ratio")
        ]
        table.add_row(name, f"{found['batch_size']:.0f}", *(f"{cell:.2f}" for cell in cells))
    console.print(table)
    console.print("tokens: " + ("all equal" if not different else f"DIFFERENT in {different} comparisons"))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    if different:
        return 1
    reached = figures["single"]["cpu_ratio"] >= arguments.min_single
    return 0 if reached and figures["mixed"]["cpu_ratio"] >= arguments.min_mixed else 2


if __name__ == "__main__":
    sys.exit(main())
