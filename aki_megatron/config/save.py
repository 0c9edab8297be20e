"""The resolved configuration in a run folder: written once, read back, and compared when a run is resumed."""

from pathlib import Path
from typing import Any

import yaml

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.field_info import format_value, list_problems
from aki_megatron.config.load import file_values
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.moved_keys import upgrade_hint
from aki_megatron.config.nested import flatten
from aki_megatron.config.run import RunConfig
from aki_megatron.config.run_file import read_run_file
from aki_megatron.config.validation import build_run, build_sections
from aki_megatron.errors import ConfigError

HEADER = "# The resolved configuration of this run; --config FILE with this file is the same run.\n"

MODEL_HEADER = "# Model and attention rule of this converted checkpoint.\n"

MAY_CHANGE = (
    "run.dir",
    "log",
    "checkpoint",
    "watch",
    "parallel",
    "deepspeed",
    "train.micro_batch_size",
    "data.num_workers",
    "data.prefetch_steps",
    "data.cache",
    "data.cache_gigabytes",
    "data.max_bad_fraction",
)
"""Keys and sections that may differ when a run is resumed: they change where and how fast it trains, not the result."""


def dump_run(run: RunConfig) -> str:
    """Return the run as YAML, every key at its resolved value; short lists on one line."""
    return HEADER + _yaml(run.model_dump(mode="json"))


def dump_model(model: ModelConfig, attention: AttentionConfig) -> str:
    """Return the two sections that a converted checkpoint holds as YAML."""
    values = {"model": model.model_dump(mode="json"), "attention": attention.model_dump(mode="json")}
    return MODEL_HEADER + _yaml(values)


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def load_model(path: Path) -> tuple[ModelConfig, AttentionConfig]:
    """Return these two sections of a run or of a file that dump_model wrote. Raises ConfigError with all problems."""
    file = read_run_file(path)
    built, problems = build_sections(file.values, file.prefix, ("model", "attention"))
    if problems:
        raise ConfigError(list_problems(str(path), problems) + upgrade_hint(path, file.values))
    return built.get("model", ModelConfig()), built["attention"]


def load_saved(path: Path) -> RunConfig:
    """Return the run in a file that dump_run wrote, or in any complete run. Raises ConfigError as load_run does."""
    return build_run(file_values(read_run_file(path)), str(path))


def compare_for_resume(saved: RunConfig, new: RunConfig) -> list[str]:
    """Return the differences because of which ``new`` cannot resume ``saved``, a sentence each.

    Which samples a step takes depends on data, seed and global_batch_size, and the learning rate on steps and
    optimizer, so those must not change.
    """
    before, after = (dict(flatten(run.model_dump(mode="json"))) for run in (saved, new))
    return [
        f"{key} was {format_value(before.get(key))} when the run started and is {format_value(after.get(key))} now"
        for key in [*before, *(k for k in after if k not in before)]
        if before.get(key) != after.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in MAY_CHANGE)
    ]


def check_resume(config_file: Path, new: RunConfig) -> None:
    """Raise ConfigError where the config.yaml of a run folder, if there is one, is of a run that ``new`` is not."""
    if not config_file.exists():
        return
    differences = compare_for_resume(load_saved(config_file), new)
    if differences:
        raise ConfigError(
            list_problems(f"{config_file} holds another run", differences)
            + "\nGive this run a folder of its own (--run.dir), or resume with --config "
            + str(config_file)
        )
