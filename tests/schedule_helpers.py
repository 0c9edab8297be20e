"""Measures of a pipeline schedule that tests compare with its bounds and with what ranks really do."""

from collections.abc import Sequence

from aki_megatron.parallel.schedule import Action, RankSchedule, ScheduleStep, build_schedule


def actions_of(schedule: RankSchedule) -> list[Action]:
    return [step.action for step in schedule if step.action is not None]


def rank_actions(rank: int, *, pipeline: int, virtual_stages: int, num_microbatches: int) -> list[Action]:
    """The actions of one pipeline rank in the order in which it runs them."""
    schedules = build_schedule(pipeline=pipeline, virtual_stages=virtual_stages, num_microbatches=num_microbatches)
    return actions_of(schedules[rank])


def num_in_flight(actions: Sequence[Action]) -> int:
    """Most forward passes whose backward pass is still to come, at any time, over all virtual stages."""
    current = most = 0
    for action in actions:
        current += 1 if action.kind == "forward" else -1
        most = max(most, current)
    return most


def num_buffered(steps: Sequence[ScheduleStep]) -> int:
    """Most inputs that a rank has received but not yet used, at the end of any step."""
    waiting: set[tuple[str, int]] = set()
    most = 0
    for step in steps:
        if step.action is not None:
            # a micro-batch returns for its next virtual stage only after this one, so the key is unique
            waiting.discard((step.action.kind, step.action.microbatch_index))
        waiting.update((message.kind, message.microbatch_index) for message in step.receives)
        most = max(most, len(waiting))
    return most
