"""The section ``validation`` of a run: when and on what it validates while it trains."""

from typing import Annotated, Literal

from pydantic import BeforeValidator

from aki_megatron.config.data import CaptionsConfig, SourceConfig
from aki_megatron.config.section import AtMost, NonNegativeInt, PositiveInt, Section, as_tuple


class ValidationConfig(Section):
    """Validation while training; docs/validation.md. It changes nothing that is trained."""

    interval: NonNegativeInt = 0
    """Optimizer steps between validations; the last step is always validated. 0: no validation."""
    at_start: bool = False
    """Validate before the first step, too."""
    sources: Annotated[tuple[SourceConfig, ...], BeforeValidator(as_tuple)] = ()
    """data.kind conversations: datasets to validate on; empty: those of data.sources whose release has the split."""
    captions: Annotated[tuple[CaptionsConfig, ...], BeforeValidator(as_tuple)] = ()
    """data.kind captions: caption sets to validate on, as in data.captions."""
    split: Literal["val", "train"] = "val"
    """Split of the datasets' releases. train: measure on training samples."""
    samples: NonNegativeInt = 256
    """Samples of each source, the same in every validation of every run; 0: all."""
    generate: NonNegativeInt = 0
    """Questions of each source to answer greedily, for the accuracy; 0: none. data.kind conversations."""
    max_new_tokens: Annotated[PositiveInt, AtMost(2**16)] = 16
    """Longest answer in tokens; every further token costs a forward pass."""
    keep_best: bool = True
    """Save a checkpoint whenever the loss is the lowest so far, name it in checkpoints/best, and keep it until there is
    a better one."""
