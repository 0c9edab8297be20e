"""The resolved configuration at rest: written into the run folder, read back, and compared when a run goes on."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from aki_megatron.config.cross_checks import report
from aki_megatron.config.field_info import shown
from aki_megatron.config.load import file_values
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.run import AttentionConfig, RunConfig
from aki_megatron.config.validation import build, build_sections
from aki_megatron.config.yaml_file import read_yaml
from aki_megatron.errors import ConfigError

HEADER = "# The resolved configuration of this run; --config FILE with this file is the same run.\n"

MODEL_HEADER = "# The model of this converted checkpoint, and who attends to whom in it.\n"

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
"""Keys and sections that may differ when a run goes on: they change where and how fast, not what is learnt."""


def dump(run: RunConfig) -> str:
    """The run as YAML, every key at its resolved value; short lists on one line."""
    return HEADER + yaml.safe_dump(
        run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )


def dump_model(model: ModelConfig, attention: AttentionConfig) -> str:
    """The part of ``dump`` that weights need to mean something: what a converted checkpoint holds."""
    values = {"model": model.model_dump(mode="json"), "attention": attention.model_dump(mode="json")}
    return MODEL_HEADER + yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )


def load_model(path: Path) -> tuple[ModelConfig, AttentionConfig]:
    """These two sections of a file that ``dump`` or ``dump_model`` wrote. Raises ConfigError with all problems."""
    built, problems = build_sections(read_yaml(path).values, lambda _: "", ("model", "attention"))
    if problems:
        raise ConfigError(report(str(path), problems))
    return built.get("model", ModelConfig()), built["attention"]


def load_saved(path: Path) -> RunConfig:
    """The run in a file that ``dump`` wrote, or any complete run. Raises ConfigError as load_run does."""
    return build(file_values(read_yaml(path)), str(path))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def compare_for_resume(saved: RunConfig, new: RunConfig) -> list[str]:
    """Differences that would make the rest of a run mean something else, a sentence each; empty where it may go on.

    Sample numbers depend on data, seed and global_batch_size, the learning rate on steps and optimizer, so those must stay.
    """
    before, after = (dict(_leaves(run.model_dump(mode="json"))) for run in (saved, new))
    return [
        f"{key} was {shown(before.get(key))} when the run started and is {shown(after.get(key))} now"
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
            report(f"{config_file} holds another run", differences)
            + "\nGive this run a folder of its own (--run.dir), or go on with --config "
            + str(config_file)
        )
