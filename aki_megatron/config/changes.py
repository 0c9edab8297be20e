"""What may differ when a run goes on: keys that change no result, and keys that --allow_change names."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aki_megatron.config.data import PhaseConfig
from aki_megatron.config.field_info import format_value, suggestion
from aki_megatron.config.nested import flatten
from aki_megatron.config.run import RunConfig
from aki_megatron.config.validation import KEYS
from aki_megatron.errors import ConfigError

MAY_CHANGE = (
    "run.dir",
    "log",
    "checkpoint",
    "validation",
    "evaluate",
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

CHANGEABLE: dict[str, str] = {
    "train.steps": (
        "the learning-rate curve is that of a run with the new number of steps from its beginning: a longer run goes "
        "on at the rate that the longer curve has at this step"
    ),
    "optimizer": "the new values hold from the next step on",
    "data.phases": "phases before the current step must stay as they were; later ones may change",
    "data.root": "the data is read from there",
    "data.tokenizer": "the tokenizer is read from there",
    "data.captions.shards": "tars are read from there; their order must stay",
    "data.sources.path": "own files are read from there; their order must stay",
    "data.sources.images": "the images of own files are read from there",
    "init": (
        "nothing: weights come from the checkpoint; what it leaves out (checkpoint.exclude_frozen_parameters) is read "
        "from there and must be the same"
    ),
}
"""Keys and sections that --allow_change may name -> what their change means for a run that goes on."""

FIXED_REASON = (
    "what the checkpoint holds was trained with it; for another value start another run (--run.dir) from this run's "
    "weights (--init.weights)"
)

TRAINABLE_REASON = (
    "the checkpoint holds optimizer state of what trained; let a later phase train otherwise (data.phases, which "
    "--allow_change data.phases may change), or start another run (--run.dir) from this run's weights (--init.weights)"
)

HISTORY = "# changed: "
"""Start of a comment in config.yaml about a change."""


def _without_indices(key: str) -> str:
    return re.sub(r"\[\d+\]", "", key)


def is_allowed(key: str, names: Sequence[str]) -> bool:
    """Return whether a key, or a section around it, is among ``names``, which have no indices of lists."""
    key = _without_indices(key)
    return any(f"{key}.".startswith(f"{name}.") for name in names)


@dataclass(frozen=True)
class Change:
    """A key of a run whose value is another than when the run started or last went on. Secrets are masked."""

    key: str
    before: Any
    after: Any

    @property
    def name(self) -> str:
        """The key without indices of lists, as --allow_change takes it."""
        return _without_indices(self.key)

    @property
    def is_free(self) -> bool:
        """Whether it changes no result, so that every start may change it."""
        return is_allowed(self.key, MAY_CHANGE)

    @property
    def is_changeable(self) -> bool:
        """Whether --allow_change may name it."""
        return is_allowed(self.key, tuple(CHANGEABLE))

    def sentence(self) -> str:
        """Return both values, for an error message."""
        before, after = self._formatted()
        return f"{self.key} was {before} when the run started and is {after} now"

    def short(self) -> str:
        """Return both values, for a console line or an event."""
        return "{} from {} to {}".format(self.key, *self._formatted())

    def _formatted(self) -> tuple[str, str]:
        """Return both values; whole, where they would look the same without their middle."""
        for max_characters in (80, 200, sys.maxsize):
            before, after = (format_value(value, max_characters) for value in (self.before, self.after))
            if before != after:
                break
        return before, after

    def history(self, step: int) -> str:
        """Return a line for config.yaml."""
        return f"{self.short()} after step {step}"


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Return the keys that differ between two runs' values, in their order."""
    old, new = dict(flatten(before, open_lists=True)), dict(flatten(after, open_lists=True))
    return [
        Change(re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key), old.get(key), new.get(key))
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key) != new.get(key)
    ]


def read_allow_change(text: str) -> tuple[str, ...]:
    """Return the keys of ``--allow_change KEY[,KEY...]``. Raises ConfigError where a key does not exist or is fixed."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ConfigError("--allow_change needs keys, such as --allow_change train.steps,optimizer.lr.")
    check_changeable(names)
    return names


def check_progress(saved: RunConfig, new: RunConfig, *, step: int, data_step: int) -> None:
    """Raise ConfigError where a changed run contradicts what is done already.

    step       optimizer steps done
    data_step  steps' worth of data used; more than ``step`` after a rollback
    """
    if new.train.steps < step:
        raise ConfigError(
            f"train.steps={new.train.steps} is less than the {step} steps that are done; "
            f"add --train.steps {step} or more."
        )
    if saved.training_plans()[0].lora != new.training_plans()[0].lora:
        raise ConfigError(
            "data.phases cannot be changed like this: the decoder would get or lose low-rank adapters (mode lora), "
            "and the checkpoint holds other tensors; start another run from it (--init.weights)."
        )
    old, changed = _phases(saved), _phases(new)
    first = 0
    for number, before in enumerate(old):
        if first >= data_step:
            return
        last = first + before.steps
        is_over = last <= data_step and number < len(old) - 1
        is_last = number == len(changed) - 1
        if number >= len(changed) or not _continues(
            before, changed[number], is_over=is_over, used=data_step - first, is_last=is_last
        ):
            raise ConfigError(
                f"data.phases[{number}] cannot be changed like this: it began after step {first}, and the data of "
                f"{data_step} steps is used; change later phases, add one, or lengthen this one."
            )
        first = last


def _continues(before: PhaseConfig, after: PhaseConfig, *, is_over: bool, used: int, is_last: bool) -> bool:
    """Return whether a phase of which ``used`` steps' worth of data is used may become ``after``."""
    if (before.sources, before.order, before.trainable) != (after.sources, after.order, after.trainable):
        return False
    return before.steps == after.steps if is_over else is_last or after.steps >= used


def _phases(run: RunConfig) -> tuple[PhaseConfig, ...]:
    return run.data.phases or (PhaseConfig(steps=run.train.steps),)


def check_changeable(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that is no key or section, or whose key cannot change while a run goes on."""
    known = {*KEYS, *CHANGEABLE, *RunConfig.model_fields, *(key.rpartition(".")[0] for key in KEYS)}
    for name in names:
        if name not in known:
            raise ConfigError(f"--allow_change {name}: there is no such key{suggestion(name, KEYS)}")
        if not is_allowed(name, (*CHANGEABLE, *MAY_CHANGE)):
            reason = TRAINABLE_REASON if name.split(".")[0] == "trainable" else FIXED_REASON
            raise ConfigError(f"--allow_change {name}: {reason}. Keys that can change: {', '.join(CHANGEABLE)}.")
