"""Pipeline schedules: which rank runs which pass and sends which message when, decided before a step. No torch.

The decoder layers are partitioned into pipeline x virtual_stages stages; virtual stage v of pipeline rank p is stage
v * pipeline + p of the model, so a micro-batch visits every rank once per virtual stage.

- virtual_stages = 1 is 1F1B (PipeDream-Flush: Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training",
  2021). It has the bubble of GPipe (Huang et al., 2019), but rank p holds the activations of at most pipeline - p
  micro-batches instead of all.
- virtual_stages > 1 is interleaved 1F1B (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU
  Clusters Using Megatron-LM", 2021, section 2.2): micro-batches in groups of ``pipeline``, each group through one
  virtual stage after another. The bubble shrinks by the number of virtual stages, the traffic grows by it. Megatron
  requires the number of micro-batches to be a multiple of the pipeline size, because its fixed order could deadlock
  otherwise; here a rank runs whatever is ready, so any number of micro-batches completes, and a smaller last group
  costs a few idle steps.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of one micro-batch through one virtual stage of a pipeline rank."""

    kind: Kind
    virtual_stage: int
    microbatch_index: int


@dataclass(frozen=True, slots=True)
class Message:
    """What crosses a stage boundary: activations (forward) or their gradient (backward)."""

    kind: Kind
    stage: int
    """Index in the whole model of the stage that receives."""
    microbatch_index: int
    peer: int
    """Pipeline rank at the other end: the receiver of what is sent, the sender of what is received."""


@dataclass(frozen=True, slots=True)
class ScheduleStep:
    """What one pipeline rank does in one step of the schedule: an action, then one batch of sends and receives.

    A message is among ``sends`` of its sender and ``receives`` of its receiver in the same step, and two ranks exchange
    at most one message each way, so the batches of all ranks match and no order of arrival can deadlock.
    """

    action: Action | None
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


RankSchedule = list[ScheduleStep]


def in_flight_limit(pipeline_rank: int, *, pipeline: int, virtual_stages: int, num_microbatches: int) -> int:
    """Return the most forward passes of a rank, over all its virtual stages, whose backward pass is still to come.

    This bounds the activations a rank holds. 1F1B: min(pipeline - p, micro-batches). With virtual stages, the first
    group must have passed all of them but the last before any backward pass, and its first gradient returns to this
    rank as many steps after the last rank as its activations took from here to there: hence the factor 2.
    """
    ranks_after = pipeline - 1 - pipeline_rank
    if virtual_stages > 1:
        ranks_after = 2 * ranks_after + (virtual_stages - 1) * min(pipeline, num_microbatches)
    return min(ranks_after + 1, virtual_stages * num_microbatches)


def _pass_order(virtual_stages: Sequence[int], pipeline: int, num_microbatches: int) -> list[tuple[int, int]]:
    """Return (virtual stage, micro-batch) in order: groups of ``pipeline`` micro-batches, stage after stage.

    While a rank runs a group through one virtual stage, the group's first micro-batch returns to it for the next.
    """
    if len(virtual_stages) == 1:
        return [(0, microbatch_index) for microbatch_index in range(num_microbatches)]
    return [
        (virtual_stage, microbatch_index)
        for first in range(0, num_microbatches, pipeline)
        for virtual_stage in virtual_stages
        for microbatch_index in range(first, min(first + pipeline, num_microbatches))
    ]


class _SimulatedRank:
    """A pipeline rank in the simulation: the actions it has still to run, and those whose input has arrived."""

    def __init__(
        self, pipeline_rank: int, pipeline: int, virtual_stages: int, num_microbatches: int, *, forward_only: bool
    ) -> None:
        stages = range(virtual_stages)
        self.forwards = deque(Action("forward", *key) for key in _pass_order(stages, pipeline, num_microbatches))
        self.backwards = deque(
            Action("backward", *key) for key in _pass_order(stages[::-1], pipeline, num_microbatches)
        )
        if forward_only:
            self.backwards.clear()
        self.ready: set[Action] = set()
        self.may_start = in_flight_limit(
            pipeline_rank, pipeline=pipeline, virtual_stages=virtual_stages, num_microbatches=num_microbatches
        )
        if forward_only:  # nothing is kept for a backward pass
            self.may_start = virtual_stages * num_microbatches

    def next_action(self) -> Action | None:
        """Return the next ready action, a forward while under the in-flight limit, else a backward; None: idle."""
        if self.may_start and self.forwards and self.forwards[0] in self.ready:
            self.may_start -= 1
            return self.forwards.popleft()
        if self.backwards and self.backwards[0] in self.ready:
            self.may_start += 1
            return self.backwards.popleft()
        return None


def build_schedule(
    *, pipeline: int, virtual_stages: int, num_microbatches: int, forward_only: bool = False
) -> list[RankSchedule]:
    """Return the schedule of every pipeline rank, by simulating all of them in lockstep.

    forward_only  no backward passes, as in validation

    In each step every rank runs at most one action, whose output is delivered at the end of the step. A stage hands to
    another stage of the same rank without a message. Idle steps are kept, except at the end of a rank's schedule.
    Execution need not be in lockstep: a rank waits for a message only before the action that needs it. (To end every
    batch of messages before the next action would make each step last as long as a backward pass, and interleaving
    slower than 1F1B.)

    The simulation always completes. Among the ranks with the fewest finished backward passes take the last: the
    gradient of its next backward pass exists. If the forward pass of that micro-batch is missing, it is within every
    rank's in-flight limit, so nothing but its own input delays it, and the input of the first stage is always
    available. With forward passes alone: all ranks have one order of passes, and the input of the first pass in it that
    is missing on some rank exists.
    """
    assert min(pipeline, virtual_stages, num_microbatches) >= 1
    ranks = [
        _SimulatedRank(rank, pipeline, virtual_stages, num_microbatches, forward_only=forward_only)
        for rank in range(pipeline)
    ]
    ranks[0].ready.update(Action("forward", 0, microbatch_index) for microbatch_index in range(num_microbatches))
    schedules: list[RankSchedule] = [[] for _ in ranks]
    while any(rank.forwards or rank.backwards for rank in ranks):
        actions = [rank.next_action() for rank in ranks]
        assert any(actions), "deadlock: every pipeline rank waits for another"
        sends: list[list[Message]] = [[] for _ in ranks]
        receives: list[list[Message]] = [[] for _ in ranks]
        for rank, action in enumerate(actions):
            enabled = _enabled_pass(action, rank, pipeline, virtual_stages)
            if action is None or enabled is None:
                continue
            kind, stage = enabled
            peer = stage % pipeline
            ranks[peer].ready.add(Action(kind, stage // pipeline, action.microbatch_index))
            if peer != rank:
                sends[rank].append(Message(kind, stage, action.microbatch_index, peer))
                receives[peer].append(Message(kind, stage, action.microbatch_index, rank))
        for schedule, action, sent, received in zip(schedules, actions, sends, receives, strict=True):
            schedule.append(ScheduleStep(action, tuple(sent), tuple(received)))
    return [_without_idle_end(schedule) for schedule in schedules]


def _enabled_pass(action: Action | None, rank: int, pipeline: int, virtual_stages: int) -> tuple[Kind, int] | None:
    """Return the pass and the stage that can run once ``action`` of ``rank`` is done; None where nothing can.

    That is the next stage's forward or the previous stage's backward. The last stage computes the loss, so its forward
    enables its own backward.
    """
    if action is None:
        return None
    stage = action.virtual_stage * pipeline + rank
    if action.kind == "backward":
        return ("backward", stage - 1) if stage else None
    return ("forward", stage + 1) if stage + 1 < pipeline * virtual_stages else ("backward", stage)


def _without_idle_end(schedule: RankSchedule) -> RankSchedule:
    length = len(schedule)
    while length and schedule[length - 1] == ScheduleStep(None, (), ()):
        length -= 1
    return schedule[:length]


def bubble_fraction(schedules: Sequence[RankSchedule]) -> float:
    """Return the fraction of steps in which a rank is idle, which is the same for every rank: 0 without a pipeline.

    1F1B: (pipeline - 1) / (micro-batches + pipeline - 1). ``schedules`` is what ``build_schedule`` returns.
    """
    longest = max(len(schedule) for schedule in schedules)
    num_actions = sum(step.action is not None for schedule in schedules for step in schedule)
    return 1 - num_actions / (longest * len(schedules))
