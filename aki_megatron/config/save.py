"""The resolved configuration in a run folder: written once, read back, and compared when a run is resumed."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.changes import HISTORY, Change, check_changeable, differences, is_allowed
from aki_megatron.config.data import OFFICIAL_IMAGES, SYSTEM_MESSAGE, ImagesConfig
from aki_megatron.config.field_info import list_problems
from aki_megatron.config.load import file_values
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.moved_keys import upgrade_hint
from aki_megatron.config.run import RunConfig
from aki_megatron.config.run_file import read_run_file
from aki_megatron.config.validation import build_run, build_sections
from aki_megatron.errors import ConfigError
from aki_megatron.masking import mask_values

HEADER = "# The resolved configuration of this run; --config FILE with this file is the same run.\n"

MODEL_HEADER = "# Model and attention rule of this converted checkpoint.\n"


def public_values(run: RunConfig, *, digests: bool = False) -> dict[str, Any]:
    """Return every value of a run as YAML and JSON hold it, secrets masked (masking.py): for reports and trackers."""
    values: dict[str, Any] = mask_values(run.model_dump(mode="json"), digests=digests)
    return values


def dump_run(run: RunConfig, history: Sequence[str] = ()) -> str:
    """Return the run as YAML, every key at its resolved value, secrets masked; short lists on one line.

    history  lines about what was changed while the run went on, for people
    """
    return HEADER + "".join(f"{HISTORY}{line}\n" for line in history) + _yaml(public_values(run, digests=True))


def dump_model(
    model: ModelConfig,
    attention: AttentionConfig,
    system_message: str = SYSTEM_MESSAGE,
    images: ImagesConfig = OFFICIAL_IMAGES,
) -> str:
    """Return the sections that a converted checkpoint holds as YAML; of the data what is not AKI's default."""
    values = {"model": model.model_dump(mode="json"), "attention": attention.model_dump(mode="json")}
    data: dict[str, Any] = {} if system_message == SYSTEM_MESSAGE else {"system_message": system_message}
    if images != OFFICIAL_IMAGES:
        data["images"] = images.model_dump(mode="json")
    if data:
        values["data"] = data
    return MODEL_HEADER + _yaml(values)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def load_model(path: Path) -> tuple[ModelConfig, AttentionConfig]:
    """Return these two sections of a run or of a file that dump_model wrote. Raises ConfigError with all problems."""
    file = read_run_file(path)
    built, problems = build_sections(file.values, file.prefix, ("model", "attention"))
    if problems:
        raise ConfigError(list_problems(str(path), problems) + upgrade_hint(path, file.values))
    return built.get("model", ModelConfig()), built["attention"]


def load_saved(path: Path) -> RunConfig:
    """Return the run in a file that dump_run wrote, or in any complete run. Raises ConfigError as load_run does.

    Settings that hold a secret are masked in it: they can be compared, not used.
    """
    return build_run(file_values(read_run_file(path)), str(path))


def compare_for_resume(saved: RunConfig, new: RunConfig, *, free: Sequence[str] = ()) -> list[Change]:
    """Return the differences because of which ``new`` cannot resume ``saved``.

    free  further keys and sections that may differ, besides those of MAY_CHANGE
    """
    found = differences(public_values(saved, digests=True), public_values(new, digests=True))
    return [change for change in found if not change.is_free and not is_allowed(change.key, free)]


def check_resume(
    config_file: Path,
    new: RunConfig,
    *,
    allow_change: Sequence[str] = (),
    free: Sequence[str] = (),
    what: str = "",
) -> list[Change]:
    """Return the changes of a run that goes on with other settings, all of them allowed.

    config_file   config.yaml of the run folder, or of a checkpoint; nothing is compared where there is none
    allow_change  keys and sections that the user allows to differ (--allow_change)
    free          keys whose difference changes nothing, such as the path of data whose content is the same
    what          names what is compared with, at the start of the error; the file, where it is empty

    Raises ConfigError where the file is of a run that ``new`` is not, or where a change is allowed that cannot be made.
    """
    check_changeable(allow_change)
    if not config_file.exists():
        return []
    changes = compare_for_resume(load_saved(config_file), new, free=free)
    refused = [change for change in changes if not is_allowed(change.key, allow_change)]
    if refused:
        raise ConfigError(
            list_problems(f"{what or config_file} holds another run", [change.sentence() for change in refused])
            + how_to_go_on(config_file, refused)
        )
    return changes


def how_to_go_on(config_file: Path, refused: Sequence[Change]) -> str:
    """Return what to do about changes that are not allowed, to follow their list."""
    text = f"\nGive this run a folder of its own (--run.dir), or resume with --config {config_file}"
    fixed = [change.key for change in refused if not change.is_changeable]
    if not fixed:
        names = dict.fromkeys(change.name for change in refused)
        text += f", or go on with the new values: --allow_change {','.join(names)}"
    elif len(fixed) < len(refused):
        text += f". While a run goes on, {', '.join(fixed)} cannot change; the others can, with --allow_change"
    return text + "."


def write_config(config_file: Path, run: RunConfig, step: int) -> list[Change]:
    """Write config.yaml of a run that starts or goes on after ``step``; return what is changed, which is recorded.

    Before the first step nothing counts as changed. What an earlier start changed stays in the comments. The file is
    replaced at once, so that nobody reads half of it.
    """
    changes, history = [], list[str]()
    if config_file.exists() and step:
        changes = compare_for_resume(load_saved(config_file), run)
        history = [
            line.removeprefix(HISTORY)
            for line in config_file.read_text(encoding="utf-8").splitlines()
            if line.startswith(HISTORY)
        ]
    history += [change.history(step) for change in changes]
    temporary = config_file.with_name(f"{config_file.name}.part")
    temporary.write_text(dump_run(run, history), encoding="utf-8")
    os.replace(temporary, config_file)
    return changes
