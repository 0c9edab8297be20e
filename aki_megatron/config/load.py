"""The command line of a launcher to a RunConfig: ``--config FILE``, ``--ds_config FILE`` and dotted overrides.

deepspeed launcher/sft.py --config configs/demo/sft.yaml --ds_config configs/zero3.json --train.steps 100
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from aki_megatron.config.changes import read_allow_change
from aki_megatron.config.deepspeed import read_json, resolve_settings
from aki_megatron.config.field_info import format_value, is_path, is_text, list_problems, takes_null
from aki_megatron.config.flags import parse_flags, print_help, problems_of_flags
from aki_megatron.config.moved_keys import upgrade_hint
from aki_megatron.config.nested import flatten, set_dotted
from aki_megatron.config.run import RunConfig
from aki_megatron.config.run_file import RunFile, read_run_file
from aki_megatron.config.validation import KEYS, build_run, build_sections, values_of
from aki_megatron.config.yaml_file import read_value
from aki_megatron.errors import ConfigError
from aki_megatron.masking import is_masked

FLAGS = {key: info for key, info in KEYS.items() if key != "deepspeed"}
"""Keys that have a flag; --ds_config stands for the section deepspeed."""


@dataclass(frozen=True)
class CommandLine:
    """The arguments that are not dotted overrides, and those that are."""

    config: Path
    ds_config: Path | None
    allow_change: tuple[str, ...]
    help: bool
    overrides: list[str]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows the usual commands.")


class _Once(argparse.Action):
    """Store the value of a flag; an error where the flag is given twice."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given = namespace.__dict__.setdefault("given", set[str]())
        if self.dest in given:
            parser.error(f"{option} is given twice; keep one of them")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def read_command_line(argv: Sequence[str], default_config: Path) -> CommandLine:
    """Split the arguments. Raises ConfigError where a file name is missing."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=default_config, action=_Once)
    # --deepspeed_config is the name that DeepSpeed's own examples use.
    parser.add_argument(
        "--ds_config", "--ds-config", "--deepspeed_config", "--deepspeed-config", type=Path, action=_Once
    )
    # The deepspeed launcher and old torch launchers pass it; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int)
    parser.add_argument("--allow_change", "--allow-change", action=_Once)
    parser.add_argument("-h", "--help", action="store_true")
    known, rest = parser.parse_known_args(list(argv))
    return CommandLine(
        config=known.config,
        ds_config=known.ds_config,
        allow_change=() if known.allow_change is None else read_allow_change(known.allow_change),
        help=known.help,
        overrides=rest,
    )


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Return dotted key -> value of every flag, read as the same text would be read in a YAML file.

    Raises ConfigError with every flag that is unknown or lacks its value.
    """
    problems = problems_of_flags(FLAGS, arguments)
    if problems:
        raise ConfigError(list_problems("command line", problems))
    values: dict[str, Any] = {}
    for key, text in parse_flags(FLAGS, arguments).items():
        is_null = text in ("null", "~", "") and (takes_null(FLAGS[key]) or is_path(FLAGS[key]))
        values[key] = None if is_null else text if is_text(FLAGS[key]) else _read_value(key, text)
    return values


def _read_value(key: str, text: str) -> Any:
    try:
        return read_value(text)
    except ConfigError as error:
        raise ConfigError(f"--{key}: {error}") from None


def masked_settings(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence per setting of a saved run that held a secret: its text is not there any more."""
    for key, value in flatten(values, open_lists=True):
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if isinstance(text, str) and is_masked(text):
                flag = re.sub(r"\.\d+(\..*)?$", "", key)
                yield (
                    f"{key} held a secret, which is masked in the saved run: {format_value(text)}. Give it again (the "
                    f"file the run was started with, or --{flag} with the whole value), or name an environment "
                    "variable in the command ($TOKEN), which is saved as it is."
                )


def file_values(file: RunFile) -> dict[str, Any]:
    """Return every value of the run in a file, with defaults. Raises ConfigError with all problems of the file.

    Sections are not checked against each other yet, because flags may resolve a contradiction.
    """
    built, problems = build_sections(file.values, file.prefix)
    if problems:
        raise ConfigError(list_problems(str(file.path), problems) + upgrade_hint(file.path, file.values))
    return values_of(built)


def load_run(argv: Sequence[str], *, default_config: Path, prog: str, description: str) -> RunConfig:
    """Return the run that a command line asks for, resolved and checked.

    Flags win over the file; ``--ds_config`` replaces the section ``deepspeed``. ``--help`` prints and exits with 0.
    Raises ConfigError: one message with all that is wrong in the file, in the flags, or between them.
    """
    command = read_command_line(argv, default_config)
    values = file_values(read_run_file(command.config))
    if command.help:
        print_help(
            FLAGS, flag_texts(values), prog=prog, description=description, config=default_config, shown=command.config
        )
    overrides = read_overrides(command.overrides)
    for key, value in overrides.items():
        set_dotted(values, key, value)
    where = " ".join([str(command.config), *(f"--{key} {format_value(value)}" for key, value in overrides.items())])
    if masked := list(masked_settings(values)):
        raise ConfigError(list_problems(where, masked))
    if command.ds_config is None:
        return build_run(values, where)
    run = build_run(values | {"deepspeed": {}}, where)
    settings, problems = resolve_settings(read_json(command.ds_config), run)
    if problems:
        raise ConfigError(list_problems(f"{command.ds_config} with {where}", problems))
    return build_run(values | {"deepspeed": settings}, where)


def flag_texts(values: dict[str, Any]) -> dict[str, str]:
    """Return dotted key -> its value as a flag would write it."""
    texts: dict[str, str] = {}
    for key in FLAGS:
        value: Any = values
        for part in key.split("."):
            value = None if value is None else value[part]  # a section may be null
        texts[key] = value if isinstance(value, str) else format_value(value)
    return texts
