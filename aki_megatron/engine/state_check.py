"""Self-check of the access to a stage's state: write a known pattern, read it back in every other way.

DeepSpeed links a parameter to its part of flat master weights and moments. A setting under which a link points
elsewhere leaves losses right and checkpoints wrong, so every run checks the links before its first step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.config.nested import flatten
from aki_megatron.engine.global_state import MOMENTS, WEIGHT
from aki_megatron.errors import ConfigError
from aki_megatron.model.stage import Stage, global_names
from aki_megatron.parallel.topology import Topology

KNOWN_CAUSES = ("zero_optimization.round_robin_gradients",)
"""DeepSpeed settings known to link parameters to wrong parts of the state."""

FRACTION = 2.0**-12
"""Added to the whole numbers of the pattern: float32 holds the sum exactly, bf16 rounds it to the whole number."""

OFFSETS = {moment: 256.0 * number for number, moment in enumerate(MOMENTS, start=1)}
"""Added to the pattern of a weight to get that of its moment."""

PERIOD, START_DISTANCE = 65_537, 7_919
"""Primes: no size of a layer or a partition is a multiple of them."""


class StateAccess(Protocol):
    """What the check reads and writes; see ShardedStage."""

    module: Stage

    def get_full_param(self, name: str, moment: str | None = None) -> Tensor: ...

    def set_full_param(self, name: str, value: Tensor, moment: str | None = None) -> None: ...

    def sync_params(self) -> None: ...

    def gathered_params(self) -> AbstractContextManager[None]:
        """Return a context inside which the module's parameters are whole; collective over the data ranks."""
        ...

    def flat_state(self) -> Sequence[tuple[Tensor, Mapping[str, Tensor]]]:
        """Return this rank's flat master weights, each with its moments, which AdamW updates element by element."""
        ...


def check_state_access(
    stage: StateAccess, topology: Topology, *, shapes: Mapping[str, torch.Size], settings: Mapping[str, Any]
) -> None:
    """Check every accessor of ``stage``; collective over its data ranks. Weights and moments are overwritten.

    - What was set as a weight is what forward passes use after ``sync_params``, and what is returned as the weight.
    - A moment is that of the same element of the master weight.
    - What was set as a moment is what is returned.

    shapes    of the module's parameters when they are whole
    settings  of the user, in DeepSpeed's format; the error says which to remove

    Raises ConfigError on every data rank where one of this is not so on any of them.
    """
    problems = list(_problems(stage, topology, _Patterns(shapes, topology.device)))
    all_problems: list[list[str]] = [[] for _ in range(topology.data)]
    dist.all_gather_object(all_problems, problems[:1], group=topology.data_group)
    if found := [problem for rank_problems in all_problems for problem in rank_problems]:
        raise ConfigError(
            f"The DeepSpeed settings lead to wrong weights or optimizer state: {found[0]}. {_remedy(settings)}"
        )


def _problems(stage: StateAccess, topology: Topology, patterns: "_Patterns") -> Iterator[str]:
    """Yield a sentence per parameter and accessor that is wrong on this rank; collective over the data ranks."""
    parameters, names = dict(stage.module.named_parameters()), global_names(stage.module)
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]

    def difference(accessor: str, name: str, found: Tensor, pattern: Tensor) -> Iterator[str]:
        expected = pattern.to(found.dtype)
        if found.shape != expected.shape or not torch.equal(found, expected):
            yield f"on rank {topology.rank}, {accessor} of {names[name]} holds other values than were written"

    for name in parameters:
        stage.set_full_param(name, patterns.get(name))
    stage.sync_params()
    for master, moments in stage.flat_state():
        for moment in MOMENTS:
            moments[moment].copy_(master.detach())
    with stage.gathered_params():
        for name, parameter in parameters.items():
            pattern = patterns.get(name)
            yield from difference("the module's parameter after sync_params", name, parameter, pattern)
            yield from difference(f"get_full_param, {WEIGHT},", name, stage.get_full_param(name), pattern)
    for name in trainable:
        pattern = patterns.get(name)
        for moment in MOMENTS:
            accessor = f"get_full_param, {moment} of the elements of the master weight,"
            yield from difference(accessor, name, stage.get_full_param(name, moment), pattern)
        for moment, offset in OFFSETS.items():
            stage.set_full_param(name, pattern + offset, moment)
    for name in trainable:
        pattern = patterns.get(name)
        for moment, offset in OFFSETS.items():
            accessor = f"get_full_param, {moment} after set_full_param,"
            yield from difference(accessor, name, stage.get_full_param(name, moment), pattern + offset)


class _Patterns:
    """Random whole numbers from 1 to 256, plus FRACTION; they repeat after PERIOD elements."""

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self._shapes = shapes
        self._numbers = {name: number for number, name in enumerate(shapes)}
        generator = torch.Generator().manual_seed(0)
        self._period = (torch.randint(1, 257, (PERIOD,), generator=generator) + FRACTION).to(device)

    def get(self, name: str) -> Tensor:
        """Return the pattern of a parameter, which starts at a place of its own in the period."""
        shape, start = self._shapes[name], self._numbers[name] * START_DISTANCE % PERIOD
        return self._period.repeat(-(-(start + shape.numel()) // PERIOD))[start : start + shape.numel()].view(shape)


def _remedy(settings: Mapping[str, Any]) -> str:
    """Return what to change, given the user's settings."""
    given = {name: value for name, value in flatten(settings) if value not in ({}, "auto")}
    causes = [name for name in KNOWN_CAUSES if given.get(name)] or list(given)
    if not causes:
        return "No setting of --ds_config causes this: use the DeepSpeed version of the requirements, or report it."
    return f"Remove {' and '.join(causes)} from the file given to --ds_config."
