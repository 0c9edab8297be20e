"""The command line of a launcher to a RunConfig: ``--config FILE``, ``--ds_config FILE`` and dotted overrides.

deepspeed launcher/sft.py --config configs/demo/sft.yaml --ds_config configs/zero3.json --train.steps 100
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from aki_megatron.config.cross_checks import report
from aki_megatron.config.deepspeed import read_json, settle
from aki_megatron.config.field_info import is_text, shown, takes_null
from aki_megatron.config.flags import parse_flags, print_help, problems_of_flags
from aki_megatron.config.run import RunConfig
from aki_megatron.config.validation import KEYS, build, build_sections, values_of
from aki_megatron.config.yaml_file import Document, Location, read_value, read_yaml
from aki_megatron.errors import ConfigError

FLAGS = {key: info for key, info in KEYS.items() if key != "deepspeed"}
"""Keys that have a flag: --ds_config stands for the section deepspeed."""


@dataclass(frozen=True)
class CommandLine:
    """What stands before the dotted overrides."""

    config: Path
    ds_config: Path | None
    help: bool
    overrides: list[str]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows the usual commands.")


def read_command_line(argv: Sequence[str], default_config: Path) -> CommandLine:
    """Split the arguments. Raises ConfigError where a file name is missing."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=default_config)
    parser.add_argument("--ds_config", "--ds-config", type=Path)
    # The deepspeed launcher and old torch launchers pass it; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int)
    parser.add_argument("-h", "--help", action="store_true")
    known, rest = parser.parse_known_args(list(argv))
    return CommandLine(config=known.config, ds_config=known.ds_config, help=known.help, overrides=rest)


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Dotted key -> value, read as the same text would be read in a YAML file.

    Raises ConfigError with every flag that is unknown or lacks its value.
    """
    problems = problems_of_flags(FLAGS, arguments)
    if problems:
        raise ConfigError(report("command line", problems))
    values: dict[str, Any] = {}
    for key, text in parse_flags(FLAGS, arguments).items():
        nothing = takes_null(FLAGS[key]) and text in ("null", "~", "")
        values[key] = None if nothing else text if is_text(FLAGS[key]) else read_value(text)
    return values


def file_values(document: Document) -> dict[str, Any]:
    """Every value of the run in a file, defaults filled in. Raises ConfigError with all problems of the file.

    Relations between sections are not checked yet: flags may mend them.
    """

    def line(location: Location) -> str:
        known = [n for n in range(len(location), 0, -1) if location[:n] in document.lines]
        return f"line {document.lines[location[: known[0]]]}: " if known else ""

    built, problems = build_sections(document.values, line)
    if problems:
        raise ConfigError(report(str(document.path), problems))
    return values_of(built)


def override(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Put dotted values into nested ones."""
    for key, value in overrides.items():
        *path, last = key.split(".")
        inner = values
        for part in path:
            inner = inner[part]
        inner[last] = value


def load_run(argv: Sequence[str], *, default_config: Path, prog: str, description: str) -> RunConfig:
    """The run a command line asks for, resolved and checked.

    Flags win over the file; ``--ds_config`` replaces the section ``deepspeed``. ``--help`` prints and exits with 0.
    Raises ConfigError: one message with all that is wrong in the file, in the flags, or between them.
    """
    command = read_command_line(argv, default_config)
    values = file_values(read_yaml(command.config))
    if command.help:
        print_help(
            FLAGS, texts(values), prog=prog, description=description, config=default_config, shown=command.config
        )
    overrides = read_overrides(command.overrides)
    override(values, overrides)
    where = " ".join([str(command.config), *(f"--{key} {shown(value)}" for key, value in overrides.items())])
    if command.ds_config is None:
        return build(values, where)
    run = build(values | {"deepspeed": {}}, where)
    settings, problems = settle(read_json(command.ds_config), run)
    if problems:
        raise ConfigError(report(f"{command.ds_config} with {where}", problems))
    return build(values | {"deepspeed": settings}, where)


def texts(values: dict[str, Any]) -> dict[str, str]:
    """Dotted key -> its value as a flag would write it."""
    found: dict[str, str] = {}
    for key in FLAGS:
        value: Any = values
        for part in key.split("."):
            value = value[part]
        found[key] = value if isinstance(value, str) else shown(value)
    return found
