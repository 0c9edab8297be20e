"""Which samples each micro-batch of each optimizer step holds: arithmetic on numbers, nothing is read or decoded.

A run is a sequence of phases; each has a stream of numbered samples of its own. Without packing, row r of step s of a
phase is sample s * rows + r. With packing, a step takes the next rows of the phase's packed order, and where that
stands is all the state there is. Rows of a step are dealt to data ranks by micro-batches, so neither the samples of a
step nor their order depend on the number of ranks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from aki_megatron.data.packing import PackedSampler, PackingState
from aki_megatron.data.sample_stream import SampleStream
from aki_megatron.errors import CheckpointError

VERSION = 1
"""Of the state; a checkpoint of another version is refused."""

State = Mapping[str, Any]


@dataclass(frozen=True)
class Phase:
    """``steps`` optimizer steps over one stream, packed or one sample per row."""

    steps: int
    stream: SampleStream
    packed: PackedSampler | None = None


@dataclass(frozen=True)
class MicroPlan:
    """One micro-batch of one data rank: its rows, each with its number in the step and its samples' numbers."""

    phase: int
    rows: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class StepPlan:
    """One step of one data rank; ``after`` is the state from which the next step goes on, the same on all ranks."""

    step: int
    micros: tuple[MicroPlan, ...]
    after: State


class BatchPlanner:
    """Deals the rows of every step to one data rank.

    Micro-batch m of rank r holds rows (m * data_size + r) * micro_batch_size + (0 ... micro_batch_size-1) of the step.
    """

    def __init__(
        self, phases: Sequence[Phase], *, step_rows: int, micro_batch_size: int, data_rank: int = 0, data_size: int = 1
    ) -> None:
        assert phases and step_rows % (micro_batch_size * data_size) == 0, (step_rows, micro_batch_size, data_size)
        assert 0 <= data_rank < data_size, (data_rank, data_size)
        self.phases = phases
        self.micro_batches = step_rows // (micro_batch_size * data_size)
        self._step_rows = step_rows
        self._micro_batch = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size

    def walk(self, start: int, state: State | None = None) -> Iterator[StepPlan]:
        """The steps from number ``start`` to the end of the last phase, which has none: it goes on for ever.

        ``state`` is that after step ``start - 1``; only packed phases need it, and none needs it at its own start.
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
            if phase.packed is None:
                yield from self._single(number, first, steps)
            else:
                place = PackingState(0, 0) if begin == first else _place(state, number, begin)
                yield from self._packed(number, phase.packed, place, steps)
            first += phase.steps

    def _single(self, phase: int, first: int, steps: Iterable[int]) -> Iterator[StepPlan]:
        for step in steps:
            begin = (step - first) * self._step_rows
            yield self._plan(step, phase, [(begin + row,) for row in range(self._step_rows)], {"version": VERSION})

    def _packed(
        self, phase: int, order: PackedSampler, place: PackingState, steps: Iterable[int]
    ) -> Iterator[StepPlan]:
        walk = order.walk(place)
        for step in steps:
            taken = [next(walk) for _ in range(self._step_rows)]
            after, _ = taken[-1]
            state = {"version": VERSION, "phase": phase, "block": after.block, "row": after.row}
            yield self._plan(step, phase, [row for _, row in taken], state)

    def _plan(self, step: int, phase: int, rows: Sequence[tuple[int, ...]], after: State) -> StepPlan:
        micros = []
        for micro in range(self.micro_batches):
            begin = (micro * self._data_size + self._data_rank) * self._micro_batch
            micros.append(MicroPlan(phase, tuple((row, rows[row]) for row in range(begin, begin + self._micro_batch))))
        return StepPlan(step, tuple(micros), after)


def _place(state: State | None, phase: int, step: int) -> PackingState:
    if state is None or state.get("version") != VERSION:
        raise CheckpointError(
            f"The checkpoint's data state is {dict(state) if state else 'missing'}, of another version than {VERSION}: "
            f"step {step} cannot go on with the samples that follow. Go on with the version that saved it, or turn "
            "data.packing off in a run of its own."
        )
    if state.get("phase") != phase:
        raise CheckpointError(
            f"The checkpoint's data state {dict(state)} is of phase {state.get('phase')}, but step {step} belongs to "
            f"phase {phase} of data.phases; give the run the phases it was started with."
        )
    return PackingState(int(state["block"]), int(state["row"]))
