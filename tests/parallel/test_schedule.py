"""Pipeline schedules, simulated: every pass runs once, in order, after its input has arrived, within the bounds."""

import time
from dataclasses import replace
from itertools import product

import pytest
from schedule_helpers import actions_of, num_buffered, num_in_flight, rank_actions

from aki_megatron.parallel.schedule import (
    Action,
    Kind,
    Message,
    RankSchedule,
    ScheduleStep,
    bubble_fraction,
    build_schedule,
    in_flight_limit,
)

GRID = list(product(range(1, 9), range(1, 5)))
MICRO_BATCHES = range(1, 18)


def simulate(ranks: list[RankSchedule], pipeline: int, virtual_stages: int) -> None:
    """Run the schedules of all ranks in lockstep; a pass may use only what was delivered before it."""
    last = pipeline * virtual_stages - 1
    done: set[tuple[str, int, int]] = set()  # (kind, stage, microbatch_index) of every pass of an earlier step
    delivered: list[set[tuple[str, int, int]]] = [set() for _ in ranks]
    for now in range(max(map(len, ranks))):
        sent, received = [], []
        fresh: set[tuple[str, int, int]] = set()
        for rank, own in enumerate(ranks):
            step = own[now] if now < len(own) else ScheduleStep(None, (), ())
            sent += [(rank, m.peer, m.kind, m.stage, m.microbatch_index) for m in step.sends]
            received += [(m.peer, rank, m.kind, m.stage, m.microbatch_index) for m in step.receives]
            outgoing: list[Message] = []
            if step.action is not None:
                kind, microbatch_index = step.action.kind, step.action.microbatch_index
                stage = step.action.virtual_stage * pipeline + rank
                assert (kind, stage, microbatch_index) not in done | fresh, "twice"
                fresh.add((kind, stage, microbatch_index))
                before = stage - 1 if kind == "forward" else stage + 1
                if kind == "backward":
                    assert ("forward", stage, microbatch_index) in done
                if 0 <= before <= last:
                    assert (kind, before, microbatch_index) in done
                    if before % pipeline != rank:
                        delivered[rank].remove((kind, stage, microbatch_index))
                after = stage + 1 if kind == "forward" else stage - 1
                if 0 <= after <= last and after % pipeline != rank:
                    outgoing = [Message(kind, after, microbatch_index, after % pipeline)]
            # the output of a pass is sent in its own step, and nothing else is
            assert list(step.sends) == outgoing
        assert sorted(sent) == sorted(received)
        pairs = [(source, target) for source, target, *_ in sent]
        assert len(set(pairs)) == len(pairs), "two messages in one direction between two ranks could be confused"
        for _, rank, kind, stage, microbatch_index in received:
            delivered[rank].add((kind, stage, microbatch_index))
        done |= fresh
    assert not any(delivered)


@pytest.mark.parametrize(("pipeline", "virtual_stages"), GRID)
def test_every_schedule_completes_with_what_was_delivered(pipeline: int, virtual_stages: int) -> None:
    for count in MICRO_BATCHES:
        ranks = build_schedule(pipeline=pipeline, virtual_stages=virtual_stages, num_microbatches=count)
        simulate(ranks, pipeline, virtual_stages)
        for own in ranks:
            everything = {
                Action(k, c, m) for k in ("forward", "backward") for c in range(virtual_stages) for m in range(count)
            }
            assert set(actions_of(own)) == everything and len(actions_of(own)) == len(everything)
            for kind, virtual_stage in product(("forward", "backward"), range(virtual_stages)):
                micros = [
                    action.microbatch_index
                    for action in actions_of(own)
                    if (action.kind, action.virtual_stage) == (kind, virtual_stage)
                ]
                assert micros == list(range(count))  # in order: gradients are summed the same way on every stage
            assert own[-1] != ScheduleStep(None, (), ())


@pytest.mark.parametrize(("pipeline", "virtual_stages"), GRID)
def test_a_schedule_of_forward_passes_alone_completes(pipeline: int, virtual_stages: int) -> None:
    for count in MICRO_BATCHES:
        ranks = build_schedule(
            pipeline=pipeline, virtual_stages=virtual_stages, num_microbatches=count, forward_only=True
        )
        simulate(ranks, pipeline, virtual_stages)
        for own in ranks:
            everything = {Action("forward", c, m) for c in range(virtual_stages) for m in range(count)}
            assert set(actions_of(own)) == everything and len(actions_of(own)) == len(everything)
            assert all(message.kind == "forward" for step in own for message in (*step.sends, *step.receives))
            assert num_buffered(own) <= max(2, min(pipeline, count)), "few inputs wait on a rank"
        if count >= pipeline:
            assert max(map(len, ranks)) == virtual_stages * count + pipeline - 1 or count % pipeline


def test_the_simulation_notices_mistakes() -> None:
    def spoiled(rank: int, now: int, **changes: object) -> list[RankSchedule]:
        ranks = build_schedule(pipeline=2, virtual_stages=2, num_microbatches=4)
        ranks[rank][now] = replace(ranks[rank][now], **changes)  # type: ignore[arg-type]
        return ranks

    ranks = build_schedule(pipeline=2, virtual_stages=2, num_microbatches=4)
    simulate(ranks, 2, 2)
    sending = next(now for now, step in enumerate(ranks[0]) if step.sends)
    receiving = next(now for now, step in enumerate(ranks[0]) if step.receives)
    mistakes = [
        spoiled(0, sending, sends=()),
        spoiled(0, receiving, receives=()),
        spoiled(0, sending, action=Action("forward", 0, 1)),  # another micro-batch than the one it sends
        spoiled(1, 0, action=Action("forward", 0, 0)),  # before its input has arrived
        [ranks[0], [*ranks[1], ranks[1][-1]]],  # the last action twice
    ]
    for mistake in mistakes:
        with pytest.raises((AssertionError, KeyError)):
            simulate(mistake, 2, 2)


@pytest.mark.parametrize(("pipeline", "virtual_stages"), GRID)
def test_memory_stays_within_its_bound(pipeline: int, virtual_stages: int) -> None:
    for count in MICRO_BATCHES:
        ranks = build_schedule(pipeline=pipeline, virtual_stages=virtual_stages, num_microbatches=count)
        for rank, own in enumerate(ranks):
            limit = in_flight_limit(rank, pipeline=pipeline, virtual_stages=virtual_stages, num_microbatches=count)
            assert num_in_flight(actions_of(own)) <= limit <= virtual_stages * count
            if virtual_stages == 1:
                assert limit == min(pipeline - rank, count)
                assert num_in_flight(actions_of(own)) == limit
            # few inputs are buffered compared with what is in flight: those of one group at most
            assert num_buffered(own) <= (2 if virtual_stages == 1 else min(pipeline + 1, count + 1))


def megatron(rank: int, pipeline: int, virtual_stages: int, count: int) -> list[Action]:
    """Megatron-LM's interleaved order (schedules.py, forward_backward_pipelining_with_interleaving), for numbers of
    micro-batches that the pipeline divides."""
    total, group = virtual_stages * count, pipeline * virtual_stages

    def nth(kind: Kind, index: int) -> Action:
        virtual_stage = index % group // pipeline
        microbatch_index = index // group * pipeline + index % pipeline
        return Action(
            kind, virtual_stage if kind == "forward" else virtual_stages - 1 - virtual_stage, microbatch_index
        )

    warm = min(2 * (pipeline - rank - 1) + (virtual_stages - 1) * pipeline, total)
    found = [nth("forward", index) for index in range(warm)]
    for index in range(total - warm):
        found += [nth("forward", warm + index), nth("backward", index)]
    return found + [nth("backward", index) for index in range(total - warm, total)]


@pytest.mark.parametrize(("pipeline", "virtual_stages", "groups"), list(product((2, 3), (2, 3, 4), (1, 2, 5))))
def test_the_interleaved_order_is_megatrons(pipeline: int, virtual_stages: int, groups: int) -> None:
    for rank in range(pipeline):
        got = rank_actions(rank, pipeline=pipeline, virtual_stages=virtual_stages, num_microbatches=groups * pipeline)
        assert got == megatron(rank, pipeline, virtual_stages, groups * pipeline)


@pytest.mark.parametrize("pipeline", [4, 6, 8])
def test_a_longer_pipeline_does_what_megatrons_does_sometimes_earlier(pipeline: int) -> None:
    # where Megatron waits for a forward although a backward is ready, ours runs it; the order of each kind is the same
    count = 3 * pipeline
    for rank in range(pipeline):
        got, megatron_actions = (
            rank_actions(rank, pipeline=pipeline, virtual_stages=2, num_microbatches=count),
            megatron(rank, pipeline, 2, count),
        )
        for kind in ("forward", "backward"):
            assert [action for action in got if action.kind == kind] == [
                action for action in megatron_actions if action.kind == kind
            ]
        assert num_in_flight(got) <= num_in_flight(megatron_actions)


def test_the_1f1b_order_by_hand() -> None:
    def letters(rank: int, count: int) -> str:
        return " ".join(
            f"{w.kind[0].upper()}{w.microbatch_index}"
            for w in rank_actions(rank, pipeline=3, virtual_stages=1, num_microbatches=count)
        )

    assert letters(0, 4) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert letters(1, 4) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert letters(2, 4) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert [letters(rank, 1) for rank in range(3)] == ["F0 B0"] * 3


def test_the_schedule_of_two_ranks_by_hand() -> None:
    first, second = build_schedule(pipeline=2, virtual_stages=1, num_microbatches=1)
    assert first == [
        ScheduleStep(Action("forward", 0, 0), (Message("forward", 1, 0, peer=1),), ()),
        ScheduleStep(None, (), ()),
        ScheduleStep(None, (), (Message("backward", 0, 0, peer=1),)),
        ScheduleStep(Action("backward", 0, 0), (), ()),
    ]
    assert second == [
        ScheduleStep(None, (), (Message("forward", 1, 0, peer=0),)),
        ScheduleStep(Action("forward", 0, 0), (), ()),
        ScheduleStep(Action("backward", 0, 0), (Message("backward", 0, 0, peer=0),), ()),
    ]


def test_one_rank_sends_nothing() -> None:
    for virtual_stages in (1, 3):
        (own,) = build_schedule(pipeline=1, virtual_stages=virtual_stages, num_microbatches=4)
        assert all(step.action is not None and not step.sends and not step.receives for step in own)
        assert bubble_fraction([own]) == 0
        assert num_buffered(own) == 0


@pytest.mark.parametrize(("pipeline", "virtual_stages"), GRID)
def test_the_bubble_is_that_of_the_papers(pipeline: int, virtual_stages: int) -> None:
    for count in MICRO_BATCHES:
        idle = bubble_fraction(build_schedule(pipeline=pipeline, virtual_stages=virtual_stages, num_microbatches=count))
        least = (pipeline - 1) / (virtual_stages * count + pipeline - 1)
        if virtual_stages == 1 or count % pipeline == 0:
            assert idle == pytest.approx(least)
        else:
            # a last group of r < pipeline micro-batches returns too early for its next virtual stage, both ways
            missing = pipeline - count % pipeline
            steps = 2 * (virtual_stages * count + pipeline - 1 + (virtual_stages - 1) * missing)
            assert least <= idle <= 1 - 2 * virtual_stages * count / steps + 1e-12


def test_counting() -> None:
    forward, backward = Action("forward", 0, 0), Action("backward", 0, 0)
    assert num_in_flight([forward, forward, backward, forward, forward, backward]) == 3
    arriving = ScheduleStep(None, (), (Message("forward", 1, 0, 0),))
    both = ScheduleStep(None, (), (Message("forward", 1, 1, 0), Message("backward", 1, 0, 2)))
    assert num_buffered([arriving, both, ScheduleStep(forward, (), ()), arriving]) == 3
    assert num_buffered([arriving, ScheduleStep(forward, (), ())] * 3) == 1


def test_a_large_schedule_is_built_quickly() -> None:
    started = time.process_time()
    ranks = build_schedule(pipeline=8, virtual_stages=4, num_microbatches=512)
    assert time.process_time() - started < 3
    assert bubble_fraction(ranks) == pytest.approx(7 / (4 * 512 + 7))


def duration(ranks: list[RankSchedule], *, lazily: bool, forward: int = 1, backward: int = 2) -> int:
    """When the last rank ends. Message batches of a rank end in order, each when all its peers have started it."""
    clock, batch = [0] * len(ranks), [0] * len(ranks)
    arrived: list[dict[tuple[str, int], int]] = [{} for _ in ranks]
    for now in range(max(map(len, ranks))):
        present = [(rank, own[now]) for rank, own in enumerate(ranks) if now < len(own)]
        for rank, step in present:
            if (action := step.action) is not None:
                start = max(clock[rank], arrived[rank].pop((action.kind, action.microbatch_index), 0))
                clock[rank] = start + (forward if action.kind == "forward" else backward)
        posted = [max(done, ended) for done, ended in zip(clock, batch, strict=True)]
        for rank, step in present:
            messages = [*step.sends, *step.receives]
            if messages:
                batch[rank] = max(posted[rank], *(posted[message.peer] for message in messages))
            for message in step.receives:
                arrived[rank][message.kind, message.microbatch_index] = batch[rank]
            if not lazily:
                clock[rank] = max(clock[rank], batch[rank])
    return max(clock)


@pytest.mark.parametrize(("pipeline", "virtual_stages"), [(2, 1), (4, 1), (8, 1), (2, 2), (2, 4), (4, 2), (4, 4)])
def test_steps_of_unequal_length_cost_nothing_when_messages_are_waited_for_late(
    pipeline: int, virtual_stages: int
) -> None:
    for count in (pipeline, 2 * pipeline, 4 * pipeline):
        ranks = build_schedule(pipeline=pipeline, virtual_stages=virtual_stages, num_microbatches=count)
        ideal = 3 * (virtual_stages * count + pipeline - 1)
        assert duration(ranks, lazily=True) == ideal
        assert (duration(ranks, lazily=False) > ideal) == (virtual_stages > 1)
