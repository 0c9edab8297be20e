"""What the model really sees: one row of a training run's batch as coloured text, and its images as PNG.

    python tools/show_batch.py --config configs/demo/sft.yaml
    python tools/show_batch.py --config configs/demo/sft.yaml --step 100 --row 3 --out /tmp/row
    python tools/show_batch.py --config configs/demo/sft.yaml --data.packing.enabled true --data.packing.sequence_length 512
    python tools/show_batch.py --config runs/try/config.yaml --step 400 --no_color > row.txt

The tokenizer, the template, the mixture, the packing and the decoding are those of a training run with this
configuration on one GPU. Overrides are written as for the launchers. Steps are counted from 1, as in metrics.jsonl;
micro-batches and rows from 0. Text and images are also written to the folder --out.

How to read it: blue is prompt, green response; underlined is learnt, that is, the token is a target of the place before
it. Special tokens are printed as they are named, in reverse. An image stands as [image 1: 144 places], padding as
[padding: 312 places]. Samples of a packed row do not see each other; a rule with their number stands between them.
Without colour, learnt tokens stand between {+ and +}. A space that is a token by itself is printed as an open box.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from aki_megatron.config.cross_checks import micro_batch_size
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.data.batch_planner import BatchPlanner, StepPlan
from aki_megatron.data.loader import LoadedMicro
from aki_megatron.data.pipeline import build_reading, build_tokenizer
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import ConfigError, UserError
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality

STYLES = {Modality.TEXT: "blue", Modality.RESPONSE: "green", Modality.IMAGE: "magenta", Modality.PAD: "bright_black"}


@dataclass(frozen=True)
class Place:
    """One place of a row."""

    token: int
    modality: Modality
    segment: int
    learnt: bool


@dataclass(frozen=True)
class Marks:
    """How things that ink does not show are printed; ASCII where the terminal knows nothing else."""

    space: str
    newline: str
    tab: str

    @classmethod
    def of(cls, encoding: str) -> "Marks":
        """The marks that an encoding can write."""
        return cls("\u2423", "\u23ce\n", "\u21e5") if encoding.lower().startswith("utf") else cls("_", "\\n\n", "\\t")


def places(batch: Batch, row: int) -> list[Place]:
    """The row, place by place. A token is learnt where the place before it in its segment has a target."""
    columns = (batch.token_ids, batch.modality_ids, batch.segment_ids, batch.targets)
    found: list[Place] = []
    before, target_before = NO_SEGMENT, IGNORE
    for token, modality, segment, target in zip(*(column[row].tolist() for column in columns), strict=True):
        learnt = segment == before and target_before != IGNORE
        assert not learnt or target_before == token, (len(found), target_before, token)
        found.append(Place(token, Modality(modality), segment, learnt))
        before, target_before = segment, target
    return found


def readable(tokenizer: Tokenizer, tokens: Sequence[int], marks: Marks) -> Iterator[tuple[str, bool]]:
    """(what tokens say, whether it is a special one) for tokens in a row.

    Tokens that are parts of characters are joined; bytes that make none are printed as numbers.
    """
    for special, group in groupby(tokens, key=tokenizer.is_special):
        if special:
            yield from ((tokenizer.token(token), True) for token in group)
            continue
        rest = b""
        for token in group:
            rest += tokenizer.spelling(token)
            try:
                text = rest.decode()
            except UnicodeDecodeError:
                continue
            rest = b""
            yield marks.space * len(text) if not text.strip(" ") else visible(text, marks), False
        if rest:
            yield visible(rest.decode(errors="backslashreplace"), marks), False


def visible(text: str, marks: Marks) -> str:
    """The text with marks for what ends lines."""
    return text.replace("\n", marks.newline).replace("\t", marks.tab)


def rendered(row: Sequence[Place], tokenizer: Tokenizer, image_places: int, marks: Marks, *, plain: bool) -> Text:
    """The row as text. ``plain`` writes marks where colours would be lost."""
    text = Text()
    images = 0
    segments = len({place.segment for place in row} - {NO_SEGMENT})
    for segment, inside in groupby(row, key=lambda place: place.segment):
        members = list(inside)
        if segment != NO_SEGMENT and segments > 1:
            text.append(
                f"{'' if not text else chr(10)}--- sample {segment + 1} of {segments}: {len(members)} places ---\n"
            )
        for (modality, learnt), run in groupby(members, key=lambda place: (place.modality, place.learnt)):
            count = [place.token for place in run]
            style = STYLES.get(modality, "yellow")
            if modality == Modality.IMAGE:
                # two images side by side are one run of places
                for _ in range(len(count) // image_places):
                    images += 1
                    text.append(f"[image {images}: {image_places} places]", style=style)
            elif modality == Modality.PAD:
                text.append(f"\n[padding: {len(count)} places]", style=style)
            else:
                text.append("{+" if plain and learnt else "")
                for word, special in readable(tokenizer, count, marks):
                    text.append(word, style + " underline" * learnt + " reverse" * special)
                text.append("+}" if plain and learnt else "")
    return text


def legend(*, plain: bool) -> Text:
    """What the colours mean."""
    if plain:
        return Text("legend: {+learnt+}  <|special|>  [image n: places]  [padding: places]")
    words = Text("legend: ")
    for word, style in (
        ("prompt", STYLES[Modality.TEXT]),
        ("response", STYLES[Modality.RESPONSE]),
        ("learnt", f"{STYLES[Modality.RESPONSE]} underline"),
        ("special token", "reverse"),
        ("image", STYLES[Modality.IMAGE]),
        ("padding", STYLES[Modality.PAD]),
    ):
        words.append(word, style=style).append("  ")
    return words


def counts(row: Sequence[Place], image_places: int) -> str:
    """A line of figures."""
    real = sum(place.modality != Modality.PAD for place in row)
    learnt = sum(place.learnt for place in row)
    images = sum(place.modality == Modality.IMAGE for place in row) // image_places
    segments = len({place.segment for place in row} - {NO_SEGMENT})
    return (
        f"{len(row):,} places: {real:,} real ({real / len(row):.1%}), {learnt:,} learnt, {images} images of "
        f"{image_places} places, {segments} samples"
    )


def pictures(batch: Batch, row: int, image_places: int) -> list[Image.Image]:
    """The images of one row as the encoder gets them, [-1, 1] back to bytes."""
    held = ((batch.modality_ids == Modality.IMAGE).sum(1) // image_places).tolist()
    first = sum(held[:row])
    pixels = batch.pixels[first : first + held[row]].permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.rint((one * 0.5 + 0.5) * 255).clip(0, 255).astype(np.uint8)) for one in pixels]


def plan_of(planner: BatchPlanner, step: int) -> StepPlan:
    """The plan of a step, counted from 0. A packed phase is dealt from its start: its rows are not known before."""
    first = 0
    for phase in planner.phases[:-1]:
        if step < first + phase.steps:
            break
        first += phase.steps
    else:
        phase = planner.phases[-1]
    return next(plan for plan in planner.walk(step if phase.packed is None else first) if plan.step == step)


def load(config: RunConfig, tokenizer: Tokenizer, step: int, micro: int, row: int) -> tuple[LoadedMicro, str]:
    """The micro-batch, and where the row comes from in words. Raises ConfigError for one that the run does not have."""
    if not 1 <= step <= config.train.steps:
        raise ConfigError(f"--step {step} must lie in 1 ... train.steps={config.train.steps}.")
    reading = build_reading(config, tokenizer, data_rank=0, data_size=1, micro_rows=micro_batch_size(config, 1))
    plan = plan_of(reading.planner, step - 1)
    if not 0 <= micro < len(plan.micros):
        raise ConfigError(f"--micro {micro} must lie in 0 ... {len(plan.micros) - 1}: a step has {len(plan.micros)}.")
    chosen = plan.micros[micro]
    if not 0 <= row < len(chosen.rows):
        raise ConfigError(
            f"--row {row} must lie in 0 ... {len(chosen.rows) - 1}: a micro-batch has {len(chosen.rows)}."
        )
    number, samples = chosen.rows[row]
    where = (
        f"step {step} of {config.train.steps}, phase {chosen.phase + 1} of {len(reading.planner.phases)}, micro-batch "
        f"{micro}, row {row} (row {number} of the step); numbers of its samples in the phase: "
        + ", ".join(f"{sample:,}" for sample in samples)
    )
    loaded = reading.micro_batches[chosen]
    if isinstance(loaded, UserError):  # found while decoding; a loader raises it at the step it belongs to
        raise loaded
    return loaded, where


def show(config: RunConfig, arguments: argparse.Namespace, console: Console) -> None:
    """Print the row and write the folder. Raises UserError."""
    tokenizer = build_tokenizer(config)
    loaded, where = load(config, tokenizer, arguments.step, arguments.micro, arguments.row)
    row, latents = places(loaded.batch, arguments.row), config.model.resampler.num_latents
    figures = counts(row, latents)
    plain = arguments.no_color or console.no_color or not console.is_terminal
    text = rendered(row, tokenizer, latents, Marks.of(console.encoding), plain=plain)
    for line in (Text(where), Text(figures), legend(plain=plain), Text(), text, Text()):
        console.print(Text(line.plain) if plain else line, soft_wrap=plain)
    for fault in loaded.faults:
        console.print(Text(f"left out or replaced: {fault.source}: {fault.reason}", style="" if plain else "red"))
    stem = f"step_{arguments.step:06d}_micro_{arguments.micro}_row_{arguments.row}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    marked = rendered(row, tokenizer, latents, Marks.of("utf-8"), plain=True).plain
    (arguments.out / f"{stem}.txt").write_text(f"{where}\n{figures}\n\n{marked}\n", encoding="utf-8")
    images = pictures(loaded.batch, arguments.row, latents)
    for number, image in enumerate(images, start=1):
        image.save(arguments.out / f"{stem}_image_{number}.png")
    console.print(Text(f"{arguments.out}/{stem}*: the text and {len(images)} images"))


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line: what is the tool's, and what is the run's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="a complete run as YAML; dotted overrides follow")
    parser.add_argument("--step", type=int, default=1, help="optimizer step, from 1; default: 1")
    parser.add_argument("--micro", type=int, default=0, help="micro-batch of the step, from 0; default: 0")
    parser.add_argument("--row", type=int, default=0, help="row of the micro-batch, from 0; default: 0")
    parser.add_argument("--out", type=Path, default=Path("runs/show_batch"),
                        help="folder for text and images; default: %(default)s")  # fmt: skip
    parser.add_argument("--no_color", "--no-color", action="store_true", help="marks instead of colours")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Show one row; the exit code."""
    arguments, overrides = parse(argv)
    console = Console(highlight=False, no_color=True if arguments.no_color else None)
    try:
        config = load_run(overrides, default_config=arguments.config, prog="tools/show_batch.py", description="")
        show(config, arguments, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
