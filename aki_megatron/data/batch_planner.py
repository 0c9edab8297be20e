"""Plan which samples each micro-batch of each optimizer step holds: arithmetic on numbers, nothing is read or decoded.

A run is a list of phases; each has a stream of numbered samples of its own. Without packing, sequence i of step s of a
phase is sample s * global_batch_size + i. With packing, a step takes the next sequences of the phase's packed order,
and the position in that order is the only state. The sequences of a step are dealt to data ranks by micro-batches, so
neither the samples of a step nor their order depend on the number of ranks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from aki_megatron.data.packing import PackedSampler, PackingState
from aki_megatron.data.sample_stream import SampleStream
from aki_megatron.errors import CheckpointError

STATE_VERSION = 2
"""Version of the data state in a checkpoint; a packed run refuses another one."""

DataState = Mapping[str, Any]
"""JSON: ``version`` and, for a packed phase, ``phase``, ``block`` and ``sequence``."""


@dataclass(frozen=True)
class Phase:
    """``steps`` optimizer steps over one stream, packed or one sample per sequence."""

    steps: int
    stream: SampleStream
    packed_sampler: PackedSampler | None = None


@dataclass(frozen=True)
class MicrobatchPlan:
    """One micro-batch of one data rank: for every sequence its index in the step and the numbers of its samples."""

    phase: int
    sequences: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class StepPlan:
    """One step of one data rank; ``next_state`` is the state that the next step starts from, the same on all ranks."""

    step: int
    microbatches: tuple[MicrobatchPlan, ...]
    next_state: DataState


class Planner(Protocol):
    """Which samples the micro-batches of every step of one data rank hold."""

    num_microbatches: int

    def plan_steps(self, start: int, state: DataState | None = None) -> Iterator[StepPlan]:
        """Yield the plans of steps ``start``, ``start + 1``, ... without end."""
        ...


class BatchPlanner:
    """Deal the sequences of every step to one data rank.

    Micro-batch m of rank r holds the sequences (m * data_size + r) * micro_batch_size + (0 ... micro_batch_size-1).
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
    ) -> None:
        sizes = (global_batch_size, micro_batch_size, data_size)
        assert phases and global_batch_size % (micro_batch_size * data_size) == 0, sizes
        assert 0 <= data_rank < data_size, (data_rank, data_size)
        self.phases = phases
        self.num_microbatches = global_batch_size // (micro_batch_size * data_size)
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size

    def plan_steps(self, start: int, state: DataState | None = None) -> Iterator[StepPlan]:
        """Yield the plans of steps ``start``, ``start + 1``, ...; the last phase goes on without end.

        ``state`` is that after step ``start - 1``; only a packed phase needs it, and not at its own start.
        Raises CheckpointError for a state that is missing or of another version.
        """
        first = 0
        for number, phase in enumerate(self.phases):
            last = number == len(self.phases) - 1
            if start >= first + phase.steps and not last:
                first += phase.steps
                continue
            begin = max(start, first)
            steps = count(begin) if last else range(begin, first + phase.steps)
            if phase.packed_sampler is None:
                yield from self._plan_unpacked(number, first, steps)
            else:
                packing = PackingState(0, 0) if begin == first else _packing_state(state, number, begin)
                yield from self._plan_packed(number, phase.packed_sampler, packing, steps)
            first += phase.steps

    def _plan_unpacked(self, phase: int, first: int, steps: Iterable[int]) -> Iterator[StepPlan]:
        for step in steps:
            begin = (step - first) * self._global_batch_size
            sequences = [(begin + index,) for index in range(self._global_batch_size)]
            yield self._plan(step, phase, sequences, {"version": STATE_VERSION})

    def _plan_packed(
        self, phase: int, sampler: PackedSampler, packing: PackingState, steps: Iterable[int]
    ) -> Iterator[StepPlan]:
        packed = sampler.iterate(packing)
        for step in steps:
            taken = [next(packed) for _ in range(self._global_batch_size)]
            after, _ = taken[-1]
            state = {"version": STATE_VERSION, "phase": phase, "block": after.block, "sequence": after.sequence}
            yield self._plan(step, phase, [sequence for _, sequence in taken], state)

    def _plan(self, step: int, phase: int, sequences: Sequence[tuple[int, ...]], next_state: DataState) -> StepPlan:
        size = self._micro_batch_size
        microbatches = []
        for number in range(self.num_microbatches):
            begin = (number * self._data_size + self._data_rank) * size
            own = tuple((index, sequences[index]) for index in range(begin, begin + size))
            microbatches.append(MicrobatchPlan(phase, own))
        return StepPlan(step, tuple(microbatches), next_state)


def _packing_state(state: DataState | None, phase: int, step: int) -> PackingState:
    if state is None or state.get("version") != STATE_VERSION:
        raise CheckpointError(
            f"The checkpoint's data state is {dict(state) if state else 'missing'}, of another version than "
            f"{STATE_VERSION}: step {step} cannot go on with the samples that follow. Go on with the version of the "
            "code that saved it, or turn data.packing off in a run of its own."
        )
    if state.get("phase") != phase:
        raise CheckpointError(
            f"The checkpoint's data state {dict(state)} is of phase {state.get('phase')}, but step {step} belongs to "
            f"phase {phase} of data.phases; give the run the phases it was started with."
        )
    return PackingState(int(state["block"]), int(state["sequence"]))
