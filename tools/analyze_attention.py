"""Look inside: which words of the question do the image tokens attend to?

    python tools/analyze_attention.py runs/demo/sft --run_val                  # the run's own val questions, by task
    python tools/analyze_attention.py aki-hf --benchmarks POPE,MMMU,MME --data /datasets/benchmarks
    python tools/analyze_attention.py MODEL --questions FOLDER --data /datasets/benchmarks   # what was answered there
    python tools/analyze_attention.py MODEL --image cat.png --question "Where is the cat?" --boxes boxes.json

MODEL is a run folder, a checkpoint, or a folder of tools/convert.py to-hf. Nothing is trained or changed.

Questions: writes attention.json, attention.md and attention.png into --out. The words of every question are put into
six categories by part of speech, and the attention of the image tokens to them is recomputed exactly for the chosen
layers while the model reads the prompt. Attention counts from an image token to a word that comes later in its turn, so
it is exactly 0 under causal, mixed and cca: what you see is what mutual attention adds.

One picture: writes entities.json and entities.png, entities against words. boxes.json holds rectangles in pixels of the
picture, {"cat": [left, top, right, bottom], "table": [[...], [...]]}; --masks FOLDER has one PNG for each entity.

Definitions, and what to make of the numbers: docs/attention_analysis.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from aki_megatron.argument_types import as_path, whole_number
from aki_megatron.config.save import load_saved
from aki_megatron.console import Console, Table, progress_bar
from aki_megatron.data.bad_samples import BadSampleBudget
from aki_megatron.errors import ConfigError, DataError, UserError
from aki_megatron.evaluate.attention_analysis.capture import chosen_layers
from aki_megatron.evaluate.attention_analysis.categories import DEFAULT_FILE, load_categories
from aki_megatron.evaluate.attention_analysis.entities import picture_size, read_boxes, read_masks
from aki_megatron.evaluate.attention_analysis.measure import measure
from aki_megatron.evaluate.attention_analysis.question import inspect_question
from aki_megatron.evaluate.attention_analysis.question_sets import (
    QuestionSets,
    benchmark_questions,
    find_profile,
    predicted_questions,
    val_questions,
)
from aki_megatron.evaluate.attention_analysis.report import Conditions, layers_text, summary_table, write_report
from aki_megatron.evaluate.attention_analysis.resampler_attention import RESAMPLER_LAYERS
from aki_megatron.evaluate.attention_analysis.taggers import AUTO, TAGGERS, open_tagger
from aki_megatron.evaluate.attention_analysis.word_map import build_word_map, write_word_map
from aki_megatron.evaluate.benchmark_report import format_value
from aki_megatron.evaluate.benchmarks.registry import BENCHMARKS
from aki_megatron.evaluate.model_loading import LoadedModel, load_saved_model
from aki_megatron.evaluate.prompts import PROFILES
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.types import Conversation, Turn, image_items

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TASKS = ("questions", "benchmarks", "run_val", "image")

console = Console()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure questions or one picture; return the exit code."""
    arguments = parse(argv)
    try:
        layers = parse_layers(arguments.layers)
        paths = (map_entities if arguments.image is not None else analyze)(arguments, layers)
    except UserError as error:
        print(f"analyze_attention: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("analyze_attention: interrupted", file=sys.stderr)
        return 130
    for path in paths:
        console.print(str(path), soft_wrap=True)
    return 0


def analyze(arguments: argparse.Namespace, layers: list[int] | None) -> list[Path]:
    """Measure questions and write the report."""
    tagger, notes = open_tagger(arguments.tagger)
    categories = load_categories(arguments.categories)
    sets, sources = open_sets(arguments)
    model = open_model(arguments)
    chosen = chosen_layers(model.stage, layers)
    console.print(f"{model.path}: rule {model.stage.attention.rule}, layers {layers_text(chosen)}; {tagger.name}")
    for note in notes:
        console.print(f"  {note}", soft_wrap=True)
    found = []
    with progress_bar("measuring", console=console) as bar:
        for name, conversations in sets.items():
            task = bar.add_task(name, total=len(conversations))
            statistics = measure(
                model,
                name,
                conversations,
                chosen,
                tagger,
                categories,
                batch_size=arguments.batch,
                progress=lambda done, task=task: bar.update(task, completed=done),  # type: ignore[misc]
            )
            found.append(statistics)
    if not sum(each.num_samples for each in found):
        reasons = [reason for each in found for reason in each.reasons]
        raise DataError("No question could be used:\n  " + "\n  ".join(reasons))
    default = "as the predictions say" if arguments.questions else next(iter(PROFILES))
    conditions = Conditions(
        model=str(model.path),
        rule=model.stage.attention.rule,
        layers=chosen,
        tagger=tagger.name,
        categories_file="the package's" if arguments.categories == DEFAULT_FILE else str(arguments.categories),
        profile="of fine-tuning" if arguments.run_val else arguments.profile or default,
        sources=tuple(sources),
        notes=tuple(notes),
    )
    summary = summary_table(found)
    table = Table(*summary.header, title=summary.title)
    for row in summary.rows:
        table.add_row(*(format_value(value) for value in row))
    console.print(table)
    for each in found:
        if each.num_errors:
            console.print(f"{each.name}: {each.num_errors} left out; first: {each.reasons[0]}", soft_wrap=True)
    return write_report(arguments.out, found, categories, conditions)


def open_sets(arguments: argparse.Namespace) -> tuple[QuestionSets, list[str]]:
    """Return the questions that the command line names, and where they are from."""
    names = [name.strip() for name in (arguments.benchmarks or "").split(",") if name.strip()]
    roots = arguments.data or default_roots()
    if arguments.run_val:
        import val_questions as run_questions  # beside this file

        config_file = RunPaths(arguments.model).config
        if not config_file.exists():
            raise ConfigError(f"--run_val needs a run folder, but {config_file} does not exist.")
        config = load_saved(config_file)
        if config.data.kind != "conversations":
            raise ConfigError(f"{arguments.model} was trained on {config.data.kind}; give a fine-tuned run.")
        opened = run_questions.open_questions(config, config_file, arguments.source)
        return val_questions(opened, arguments.samples, BadSampleBudget(config.data.max_bad_fraction)), []
    profile = find_profile(arguments.profile) if arguments.profile else None
    if arguments.questions is not None:
        return predicted_questions(arguments.questions, names, roots, profile, arguments.samples, print_line)
    profile = profile or next(iter(PROFILES.values()))
    return benchmark_questions(names, roots, profile, arguments.samples, print_line)


def map_entities(arguments: argparse.Namespace, layers: list[int] | None) -> list[Path]:
    """Measure one picture and write the map of entities and words."""
    if not arguments.question:
        raise ConfigError('--image needs a question: --question "Where is the cat?"')
    if (arguments.boxes is None) == (arguments.masks is None):
        raise ConfigError("--image needs where the entities are: either --boxes FILE or --masks FOLDER.")
    try:
        picture = arguments.image.read_bytes()
    except OSError as error:
        raise DataError(f"--image {arguments.image} cannot be read: {error.strerror}.") from None
    model = open_model(arguments)
    vision = model.stage.config.vision
    size, side = (
        picture_size(picture, model.image_options, str(arguments.image)),
        vision.image_size // vision.patch_size,
    )
    entities = read_boxes(arguments.boxes, size, side) if arguments.boxes else read_masks(arguments.masks, size, side)
    conversation = Conversation(str(arguments.image), (Turn(arguments.question, ""),), image_items(picture))
    attention = inspect_question(
        model.stage,
        model.template,
        conversation,
        layers=layers,
        resampler_layers=arguments.resampler_layers,
        image_options=model.image_options,
    )
    found = build_word_map(attention, entities)
    table = Table("entity", *found.words, title="attention to each word")
    for name, values in zip(found.entities, found.values.tolist(), strict=True):
        table.add_row(name, *(f"{value:.4f}" for value in values))
    console.print(table)
    conditions = {
        "model": str(model.path),
        "image": str(arguments.image),
        "question": arguments.question,
        "entities_from": str(arguments.boxes or arguments.masks),
        "resampler_layers": arguments.resampler_layers,
    }
    return write_word_map(arguments.out, found, attention, conditions)


def open_model(arguments: argparse.Namespace) -> LoadedModel:
    """Load the model onto the chosen device."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_saved_model(
        arguments.model, tokenizer=arguments.tokenizer, device=device, dtype=DTYPES[arguments.dtype]
    )


def parse_layers(text: str) -> list[int] | None:
    """Return the layers of a comma list; None for ``all``. Raises ConfigError for anything else."""
    if text == "all":
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--layers {text!r} must be all, or numbers such as 0,15,31 (--layers=-1: the last)."
        ) from None


def default_roots() -> list[Path]:
    """Return where benchmarks' files are looked for if no folder is given."""
    kit = os.environ.get("LMUData", "")  # noqa: SIM112, VLMEvalKit's own spelling
    return [Path(kit)] * bool(kit) + [Path("data/benchmarks")]


def print_line(line: str) -> None:
    """Print a line as it is."""
    console.print(line, soft_wrap=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exactly one of TASKS is given."""
    # fmt: off
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", type=as_path, help="run folder, checkpoint, or folder of convert.py to-hf")
    add("--run_val", action="store_true", help="measure the val questions of the run folder MODEL, by task")
    add("--source", help="with --run_val: questions in files of one's own, as an entry of data.sources in YAML")
    add("--questions", type=as_path, help="measure the questions of a folder of predictions (tools/evaluate.py)")
    add("--benchmarks", help=f"measure benchmarks, a comma list of {', '.join(BENCHMARKS)}; with --questions: of these")
    add("--data", type=as_path, action="append", default=[],
        help="folder of the benchmarks' files; may be repeated (default: the variable LMUData, then data/benchmarks)")
    add("--profile", help=f"prompts of benchmarks: {' or '.join(PROFILES)} (default: {next(iter(PROFILES))}; with "
        "--questions: as the predictions say)")
    add("--samples", type=whole_number(0, 10**9), default=200,
        help="most questions of each benchmark or task, evenly spaced by number; 0: all (default %(default)s)")
    add("--image", type=as_path, help="map the entities of one picture instead")
    add("--question", help="with --image: what is asked")
    add("--boxes", type=as_path, help="with --image: JSON file of rectangles")
    add("--masks", type=as_path, help="with --image: folder of one PNG for each entity, as large as the picture")
    add("--resampler_layers", choices=RESAMPLER_LAYERS, default="mean",
        help="with --image: whose cross-attention places the image tokens in the picture (default %(default)s)")
    add("--layers", default="all", help="decoder layers, such as 0,15,31 (--layers=-1: the last; default %(default)s)")
    add("--tagger", choices=(AUTO, *TAGGERS), default=AUTO,
        help=f"part-of-speech tagger; {AUTO}: the first of {', '.join(TAGGERS)} that is installed")
    add("--categories", type=as_path, default=DEFAULT_FILE,
        help="YAML file of the categories (default: aki_megatron/evaluate/attention_analysis/categories.yaml)")
    add("--tokenizer", type=as_path, help="folder of the tokenizer (default: the checkpoint's)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", choices=DTYPES, default="fp32",
        help="precision of the model; probabilities are always fp32 (default %(default)s)")
    add("--batch", type=whole_number(1, 4096), default=8, help="prompts in one pass (default %(default)s)")
    add("--out", type=as_path, default=Path("attention"), help="folder to write to (default %(default)s)")
    # fmt: on
    arguments = parser.parse_args(argv)
    given = [name for name in TASKS if getattr(arguments, name)]
    if len(given) != 1 and given != ["questions", "benchmarks"]:
        parser.error(f"give one of {', '.join(f'--{name}' for name in TASKS)} to say what to measure; got "
                     f"{', '.join(f'--{name}' for name in given) or 'none'}")  # fmt: skip
    return arguments


if __name__ == "__main__":
    sys.exit(main())
