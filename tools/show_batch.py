"""Show what the model really sees: one sequence of a training run's batch as coloured text, and its images as PNG.

    python tools/show_batch.py --config configs/demo/sft.yaml
    python tools/show_batch.py --config configs/demo/sft.yaml --step 100 --sequence 3 --out /tmp/sequence
    python tools/show_batch.py --config configs/demo/sft.yaml --data.packing.enabled true
    python tools/show_batch.py --config runs/try/config.yaml --step 400 --no_color > sequence.txt

The tokenizer, the template, the mixture, the packing and the decoding are those of a training run with this
configuration on one GPU. Overrides are written as for the launchers. Steps are counted from 1, as in metrics.jsonl;
micro-batches and sequences from 0. Text and images are also written to the folder --out.

How to read it: blue is prompt, green response; underlined is supervised, that is, the token is the target of the
position before it. Special tokens are printed by name, in reverse. An image is printed as [image 1: 144 positions],
a recording as [audio 1: 64 positions], padding as [padding: 312 positions]. Samples of a packed sequence do not see
each other; a line with their number separates them.
Without colour, supervised tokens are between {+ and +}. A space that is a token by itself is printed as an open box.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from aki_megatron.config.batch_sizes import micro_batch_size
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.console import Console, Text
from aki_megatron.data.batch_planner import BatchPlanner, StepPlan
from aki_megatron.data.loader import LoadedMicrobatch
from aki_megatron.data.media import num_media_tokens
from aki_megatron.data.pipeline import build_data_pipeline, build_tokenizer
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import ConfigError, UserError
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality

STYLES = {
    Modality.TEXT: "blue",
    Modality.RESPONSE: "green",
    Modality.IMAGE: "magenta",
    Modality.AUDIO: "cyan",
    Modality.PAD: "bright_black",
}

MediaTokens = Mapping[Modality, int]
"""Positions of one item of every modality of the model."""


@dataclass(frozen=True)
class Position:
    """One position of a sequence."""

    token: int
    modality: Modality
    segment: int
    supervised: bool


@dataclass(frozen=True)
class Marks:
    """How invisible characters are printed; ASCII where the terminal's encoding has nothing else."""

    space: str
    newline: str
    tab: str

    @classmethod
    def of(cls, encoding: str) -> "Marks":
        """Return the marks that an encoding can write."""
        return cls("\u2423", "\u23ce\n", "\u21e5") if encoding.lower().startswith("utf") else cls("_", "\\n\n", "\\t")


def sequence_positions(batch: Batch, index: int) -> list[Position]:
    """Return the positions of a sequence. A token is supervised where the one before it in its segment has a target."""
    columns = (batch.token_ids, batch.modality_ids, batch.segment_ids, batch.targets)
    positions: list[Position] = []
    before, target_before = NO_SEGMENT, IGNORE
    for token, modality, segment, target in zip(*(column[index].tolist() for column in columns), strict=True):
        supervised = segment == before and target_before != IGNORE
        assert not supervised or target_before == token, (len(positions), target_before, token)
        positions.append(Position(token, Modality(modality), segment, supervised))
        before, target_before = segment, target
    return positions


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int], marks: Marks) -> Iterator[tuple[str, bool]]:
    """Yield (text of one or more tokens, whether it is a special token).

    Tokens that are parts of characters are joined; bytes that make none are printed as numbers.
    """
    for special, group in groupby(tokens, key=tokenizer.is_special):
        if special:
            yield from ((tokenizer.token_name(token), True) for token in group)
            continue
        rest = b""
        for token in group:
            rest += tokenizer.token_bytes(token)
            try:
                text = rest.decode()
            except UnicodeDecodeError:
                continue
            rest = b""
            yield marks.space * len(text) if not text.strip(" ") else mark_invisible(text, marks), False
        if rest:
            yield mark_invisible(rest.decode(errors="backslashreplace"), marks), False


def mark_invisible(text: str, marks: Marks) -> str:
    """Return the text with marks for newlines and tabs."""
    return text.replace("\n", marks.newline).replace("\t", marks.tab)


def render(
    sequence: Sequence[Position], tokenizer: Tokenizer, media_tokens: MediaTokens, marks: Marks, *, plain: bool
) -> Text:
    """Render a sequence as text; ``plain`` writes marks where colours would be lost."""
    text = Text()
    counts: Counter[Modality] = Counter()
    num_segments = len({position.segment for position in sequence} - {NO_SEGMENT})
    for segment, inside in groupby(sequence, key=lambda position: position.segment):
        members = list(inside)
        if segment != NO_SEGMENT and num_segments > 1:
            newline = "" if not text else "\n"
            text.append(f"{newline}--- sample {segment + 1} of {num_segments}: {len(members)} positions ---\n")
        for (modality, supervised), run in groupby(members, key=lambda member: (member.modality, member.supervised)):
            tokens = [position.token for position in run]
            style = STYLES.get(modality, "yellow")
            if num_positions := media_tokens.get(modality):
                # two adjacent items are one run of positions
                for _ in range(len(tokens) // num_positions):
                    counts[modality] += 1
                    name = f"{modality.name.lower()} {counts[modality]}"
                    text.append(f"[{name}: {num_positions} positions]", style=style)
            elif modality == Modality.PAD:
                text.append(f"\n[padding: {len(tokens)} positions]", style=style)
            else:
                text.append("{+" if plain and supervised else "")
                for part, special in token_texts(tokenizer, tokens, marks):
                    text.append(part, style + " underline" * supervised + " reverse" * special)
                text.append("+}" if plain and supervised else "")
    return text


def legend(*, plain: bool) -> Text:
    """Return what the colours mean."""
    if plain:
        return Text(
            "legend: {+supervised+}  <|special|>  [image n: positions]  [audio n: positions]  [padding: positions]"
        )
    text = Text("legend: ")
    for name, style in (
        ("prompt", STYLES[Modality.TEXT]),
        ("response", STYLES[Modality.RESPONSE]),
        ("supervised", f"{STYLES[Modality.RESPONSE]} underline"),
        ("special token", "reverse"),
        ("image", STYLES[Modality.IMAGE]),
        ("audio", STYLES[Modality.AUDIO]),
        ("padding", STYLES[Modality.PAD]),
    ):
        text.append(name, style=style).append("  ")
    return text


def statistics_line(sequence: Sequence[Position], media_tokens: MediaTokens) -> str:
    """Return the counts of a sequence."""
    num_real = sum(position.modality != Modality.PAD for position in sequence)
    num_supervised = sum(position.supervised for position in sequence)
    media = "".join(
        f"{sum(position.modality == modality for position in sequence) // number} "
        f"{'images' if modality == Modality.IMAGE else 'recordings'} of {number} positions, "
        for modality, number in media_tokens.items()
    )
    num_segments = len({position.segment for position in sequence} - {NO_SEGMENT})
    return (
        f"{len(sequence):,} positions: {num_real:,} real ({num_real / len(sequence):.1%}), {num_supervised:,} "
        f"supervised, {media}{num_segments} samples"
    )


def sequence_images(batch: Batch, index: int, num_image_tokens: int) -> list[Image.Image]:
    """Return the images of one sequence as the encoder gets them, [-1, 1] back to bytes."""
    num_images = ((batch.modality_ids == Modality.IMAGE).sum(1) // num_image_tokens).tolist()
    first = sum(num_images[:index])
    pixels = batch.media[Modality.IMAGE][first : first + num_images[index]].permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.rint((image * 0.5 + 0.5) * 255).clip(0, 255).astype(np.uint8)) for image in pixels]


def find_plan(planner: BatchPlanner, step: int) -> StepPlan:
    """Return the plan of a step, counted from 0. A packed phase is planned from its start: its state is not known."""
    first = 0
    for phase in planner.phases[:-1]:
        if step < first + phase.steps:
            break
        first += phase.steps
    else:
        phase = planner.phases[-1]
    start = step if phase.packed_sampler is None else first
    return next(plan for plan in planner.plan_steps(start) if plan.step == step)


def load(
    config: RunConfig, tokenizer: Tokenizer, step: int, microbatch: int, index: int
) -> tuple[LoadedMicrobatch, str]:
    """Return the micro-batch, and a sentence that says where the sequence comes from.

    Raises ConfigError for a step, micro-batch or sequence that the run does not have.
    """
    if not 1 <= step <= config.train.steps:
        raise ConfigError(f"--step {step} must lie in 1 ... train.steps={config.train.steps}.")
    pipeline = build_data_pipeline(config, tokenizer, micro_batch_size=micro_batch_size(config, 1))
    microbatches = find_plan(pipeline.planner, step - 1).microbatches
    if not 0 <= microbatch < len(microbatches):
        raise ConfigError(
            f"--microbatch {microbatch} must lie in 0 ... {len(microbatches) - 1}: a step has {len(microbatches)}."
        )
    plan = microbatches[microbatch]
    if not 0 <= index < len(plan.sequences):
        raise ConfigError(
            f"--sequence {index} must lie in 0 ... {len(plan.sequences) - 1}: a micro-batch has {len(plan.sequences)}."
        )
    number, samples = plan.sequences[index]
    origin = (
        f"step {step} of {config.train.steps}, phase {plan.phase + 1} of {len(pipeline.planner.phases)}, micro-batch "
        f"{microbatch}, sequence {index} (sequence {number} of the step); numbers of its samples in the phase: "
        + ", ".join(f"{sample:,}" for sample in samples)
    )
    loaded = pipeline.dataset[plan]
    if isinstance(loaded, UserError):  # found while decoding; a loader raises it at the step it belongs to
        raise loaded
    return loaded, origin


def show(config: RunConfig, arguments: argparse.Namespace, console: Console) -> None:
    """Print the sequence and write the folder. Raises UserError."""
    tokenizer = build_tokenizer(config)
    index, media_tokens = arguments.sequence, num_media_tokens(config.model)
    loaded, origin = load(config, tokenizer, arguments.step, arguments.microbatch, index)
    sequence = sequence_positions(loaded.batch, index)
    counts = statistics_line(sequence, media_tokens)
    plain = arguments.no_color or console.no_color or not console.is_terminal
    text = render(sequence, tokenizer, media_tokens, Marks.of(console.encoding), plain=plain)
    for line in (Text(origin), Text(counts), legend(plain=plain), Text(), text, Text()):
        console.print(Text(line.plain) if plain else line, soft_wrap=plain)
    for bad in loaded.bad_samples:
        console.print(Text(f"left out or replaced: {bad.source}: {bad.reason}", style="" if plain else "red"))
    stem = f"step_{arguments.step:06d}_microbatch_{arguments.microbatch}_sequence_{index}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    marked = render(sequence, tokenizer, media_tokens, Marks.of("utf-8"), plain=True).plain
    (arguments.out / f"{stem}.txt").write_text(f"{origin}\n{counts}\n\n{marked}\n", encoding="utf-8")
    images = sequence_images(loaded.batch, index, media_tokens[Modality.IMAGE])
    for number, image in enumerate(images, start=1):
        image.save(arguments.out / f"{stem}_image_{number}.png")
    console.print(Text(f"{arguments.out}/{stem}*: the text and {len(images)} images"))


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line: the tool's arguments, and the run's overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="a complete run as YAML; dotted overrides follow")
    parser.add_argument("--step", type=int, default=1, help="optimizer step, from 1; default: 1")
    parser.add_argument("--microbatch", type=int, default=0,
                        help="micro-batch of the step, from 0; default: 0")  # fmt: skip
    parser.add_argument("--sequence", type=int, default=0, help="sequence of the micro-batch, from 0; default: 0")
    parser.add_argument("--out", type=Path, default=Path("runs/show_batch"),
                        help="folder for text and images; default: %(default)s")  # fmt: skip
    parser.add_argument("--no_color", "--no-color", action="store_true", help="marks instead of colours")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Show one sequence; return the exit code."""
    arguments, overrides = parse(argv)
    console = Console(no_color=True if arguments.no_color else None)
    try:
        config = load_run(overrides, default_config=arguments.config, prog="tools/show_batch.py", description="")
        show(config, arguments, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
