"""Dotted flags through tyro: one flag per key, values as text (they are read and checked as YAML values are)."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from aki_megatron.config.changes import CHANGEABLE
from aki_megatron.config.field_info import allowed, format_value, metavar, section_class, suggestion
from aki_megatron.config.moved_keys import MOVED_KEYS
from aki_megatron.config.run import RunConfig

UNSET = "\0"
"""Text of a flag that was not given; no shell can pass it."""

OTHER_TRAINERS = {
    "deepspeed": "--ds_config",
    "lr": "--optimizer.lr",
    "seed": "--train.seed",
    "batch_size": "--train.global_batch_size",
    "resume": "--run.dir (a run resumes by itself from the newest checkpoint in its folder)",
}
"""Flag of other trainers -> ours, for error messages."""

USAGE = """\
{description}

The usual commands:

  deepspeed --num_gpus 8 {prog} --ds_config configs/zero3.json
  torchrun --nproc_per_node 8 {prog} --config {config} --train.steps 100
  python {prog} --config configs/demo/{name}.yaml --run.dir runs/try --train.seed 7

--config FILE     a complete run as YAML (default: {config}); `base: other.yaml` in it takes the values of another file
--ds_config FILE  DeepSpeed's own settings as JSON; "auto" stands for what the run decides
--allow_change KEY[,KEY...]
                  keys that may differ from the saved config.yaml when a run goes on, for example to train longer:
                  --allow_change train.steps --train.steps 2000. Can change: {changeable}

Every key below can be written as a flag; a flag wins over the file, and the last of several over the others. Values are
written as in YAML, lists in quotes: --parallel.layers_per_stage '[7, 9, 9, 7]'. The values in brackets are
those of {shown}.
"""


def _flag_class(model: type[BaseModel], texts: Mapping[str, str], prefix: str, flags: Mapping[str, FieldInfo]) -> type:
    """Return a dataclass shaped like ``model`` whose leaves are texts: what tyro parses and prints."""
    members: list[tuple[str, Any, Any]] = []
    for name, info in model.model_fields.items():
        key, inner = prefix + name, section_class(info.annotation)
        if inner is not None:
            part = _flag_class(inner, texts, f"{key}.", flags)
            members.append((name, part, dataclasses.field(default_factory=part)))
        elif key in flags:
            help_text = " ".join((info.description or "").split())
            argument = tyro.conf.arg(help=help_text, metavar=metavar(info))
            members.append((name, Annotated[str, argument], dataclasses.field(default=texts[key])))
    return dataclasses.make_dataclass(model.__name__, members, namespace={"__doc__": model.__doc__})


def problems_of_flags(flags: Mapping[str, FieldInfo], arguments: Sequence[str]) -> list[str]:
    """Return a sentence per flag that is unknown or lacks its value, and per argument that belongs to no flag."""
    problems: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            problems.append(f"{argument} belongs to no flag; overrides are written --section.key value.")
            continue
        name, equals, _ = argument[2:].partition("=")
        name = name.replace("-", "_")
        has_value = bool(equals) or (bool(rest) and not rest[0].startswith("--"))
        if has_value and not equals:
            rest.pop(0)
        if name in MOVED_KEYS:
            problems.append(f"--{name} is called --{MOVED_KEYS[name]} now.")
        elif name in OTHER_TRAINERS:
            problems.append(f"unknown flag --{name}; did you mean {OTHER_TRAINERS[name]}?")
        elif name not in flags:
            meant = suggestion(name, flags).replace("did you mean ", "did you mean --").replace(" or ", " or --")
            problems.append(f"unknown flag --{name}{meant}")
        elif not has_value:
            problems.append(f"--{name} needs a value: {allowed(flags[name])}.")
    return problems


def repeated_flags(arguments: Sequence[str]) -> list[str]:
    """Return a line per flag that is given with several values; ``arguments`` passed problems_of_flags.

    The last value counts, so that flags may follow those that a batch script sets.
    """
    values: dict[str, list[str]] = {}
    for position, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            values.setdefault(name.replace("-", "_"), []).append(value if equals else arguments[position + 1])
    return [
        f"--{name} is given {len(texts)} times; the last one counts: {format_value(texts[-1])}"
        for name, texts in values.items()
        if len(set(texts)) > 1
    ]


def parse_flags(flags: Mapping[str, FieldInfo], arguments: Sequence[str]) -> dict[str, str]:
    """Return dotted key -> text of every flag that was given; ``arguments`` passed problems_of_flags."""
    flag_class = _flag_class(RunConfig, dict.fromkeys(flags, UNSET), "", flags)
    parsed = dataclasses.asdict(tyro.cli(flag_class, args=list(arguments), use_underscores=True))
    given: dict[str, str] = {}
    for key in flags:
        text: Any = parsed
        for part in key.split("."):
            text = text[part]
        if text != UNSET:
            given[key] = text
    return given


def print_help(
    flags: Mapping[str, FieldInfo], texts: Mapping[str, str], *, prog: str, description: str, config: Path, shown: Path
) -> NoReturn:
    """Print the usual commands, then every flag with its help and its value in the file ``shown``; exit with 0."""
    usage = USAGE.format(
        description=description,
        prog=prog,
        config=config,
        shown=shown,
        name=Path(prog).stem,
        changeable=", ".join(CHANGEABLE),
    )
    shown_class = _flag_class(RunConfig, texts, "", flags)
    try:
        with contextlib.suppress(SystemExit):
            tyro.cli(
                shown_class, args=["--help"], prog=prog, description=usage, use_underscores=True, compact_help=False
            )
        sys.stdout.flush()
    except BrokenPipeError:
        # `--help | head` closes the pipe early: end quietly, as other commands do, also when Python flushes at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)
