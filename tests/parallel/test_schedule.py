"""The pipeline's schedule, played out: everything runs once, in order, when its input is there, within its bounds."""

import time
from dataclasses import replace
from itertools import product

import pytest

from aki_megatron.parallel.schedule import (
    Message,
    Tick,
    Work,
    bubble,
    in_flight,
    in_flight_limit,
    order,
    parked,
    schedule,
)

GRID = list(product(range(1, 9), range(1, 5)))
MICRO_BATCHES = range(1, 18)


def works(ticks: list[Tick]) -> list[Work]:
    return [tick.work for tick in ticks if tick.work is not None]


def play(ranks: list[list[Tick]], pipeline: int, chunks: int) -> None:
    """Run the ticks of all ranks in step, with nothing but what was delivered."""
    last = pipeline * chunks - 1
    made: set[tuple[str, int, int]] = set()  # (kind, stage, micro) of every work done in an earlier tick
    delivered: list[set[tuple[str, int, int]]] = [set() for _ in ranks]
    for now in range(max(map(len, ranks))):
        sent, received, fresh = [], [], set()
        for rank, own in enumerate(ranks):
            tick = own[now] if now < len(own) else Tick(None, (), ())
            sent += [(rank, m.peer, m.kind, m.stage, m.micro) for m in tick.sends]
            received += [(m.peer, rank, m.kind, m.stage, m.micro) for m in tick.receives]
            outgoing: list[Message] = []
            if tick.work is not None:
                kind, micro = tick.work.kind, tick.work.micro
                stage = tick.work.chunk * pipeline + rank
                assert (kind, stage, micro) not in made | fresh, "twice"
                fresh.add((kind, stage, micro))
                before = stage - 1 if kind == "forward" else stage + 1
                if kind == "backward":
                    assert ("forward", stage, micro) in made
                if 0 <= before <= last:
                    assert (kind, before, micro) in made
                    if before % pipeline != rank:
                        delivered[rank].remove((kind, stage, micro))
                after = stage + 1 if kind == "forward" else stage - 1
                if 0 <= after <= last and after % pipeline != rank:
                    outgoing = [Message(kind, after, micro, after % pipeline)]
            # what a work makes leaves in its own tick, and nothing else does
            assert list(tick.sends) == outgoing
        assert sorted(sent) == sorted(received)
        pairs = [(source, target) for source, target, *_ in sent]
        assert len(set(pairs)) == len(pairs), "two messages one way between two ranks could be taken for one another"
        for _, rank, kind, stage, micro in received:
            delivered[rank].add((kind, stage, micro))
        made |= fresh
    assert not any(delivered)


@pytest.mark.parametrize(("pipeline", "chunks"), GRID)
def test_every_schedule_completes_with_what_was_delivered(pipeline: int, chunks: int) -> None:
    for count in MICRO_BATCHES:
        ranks = schedule(pipeline=pipeline, chunks=chunks, micro_batches=count)
        play(ranks, pipeline, chunks)
        for own in ranks:
            everything = {Work(k, c, m) for k in ("forward", "backward") for c in range(chunks) for m in range(count)}
            assert set(works(own)) == everything and len(works(own)) == len(everything)
            for kind, chunk in product(("forward", "backward"), range(chunks)):
                micros = [work.micro for work in works(own) if (work.kind, work.chunk) == (kind, chunk)]
                assert micros == list(range(count))  # in order: gradients are summed the same way on every stage
            assert own[-1] != Tick(None, (), ())


def test_the_play_notices_what_is_wrong() -> None:
    def spoiled(rank: int, now: int, **changes: object) -> list[list[Tick]]:
        ranks = schedule(pipeline=2, chunks=2, micro_batches=4)
        ranks[rank][now] = replace(ranks[rank][now], **changes)  # type: ignore[arg-type]
        return ranks

    ranks = schedule(pipeline=2, chunks=2, micro_batches=4)
    play(ranks, 2, 2)
    sending = next(now for now, tick in enumerate(ranks[0]) if tick.sends)
    receiving = next(now for now, tick in enumerate(ranks[0]) if tick.receives)
    mistakes = [
        spoiled(0, sending, sends=()),
        spoiled(0, receiving, receives=()),
        spoiled(0, sending, work=Work("forward", 0, 1)),  # of another micro-batch than it sends
        spoiled(1, 0, work=Work("forward", 0, 0)),  # before its input is there
        [ranks[0], [*ranks[1], ranks[1][-1]]],  # the last work once more
    ]
    for mistake in mistakes:
        with pytest.raises((AssertionError, KeyError)):
            play(mistake, 2, 2)


@pytest.mark.parametrize(("pipeline", "chunks"), GRID)
def test_memory_stays_within_its_bound(pipeline: int, chunks: int) -> None:
    for count in MICRO_BATCHES:
        ranks = schedule(pipeline=pipeline, chunks=chunks, micro_batches=count)
        for rank, own in enumerate(ranks):
            limit = in_flight_limit(rank, pipeline=pipeline, chunks=chunks, micro_batches=count)
            assert in_flight(works(own)) <= limit <= chunks * count
            if chunks == 1:
                assert limit == min(pipeline - rank, count)
                assert in_flight(works(own)) == limit
            # inputs that wait are few beside what is in flight: those of one group at most
            assert parked(own) <= (2 if chunks == 1 else min(pipeline + 1, count + 1))


def megatron(rank: int, pipeline: int, chunks: int, count: int) -> list[Work]:
    """Megatron-LM's interleaved order (schedules.py, forward_backward_pipelining_with_interleaving), for numbers of
    micro-batches that the pipeline divides."""
    total, group = chunks * count, pipeline * chunks

    def work(kind: str, index: int) -> Work:
        chunk = index % group // pipeline
        micro = index // group * pipeline + index % pipeline
        return Work(kind, chunk if kind == "forward" else chunks - 1 - chunk, micro)  # type: ignore[arg-type]

    warm = min(2 * (pipeline - rank - 1) + (chunks - 1) * pipeline, total)
    found = [work("forward", index) for index in range(warm)]
    for index in range(total - warm):
        found += [work("forward", warm + index), work("backward", index)]
    return found + [work("backward", index) for index in range(total - warm, total)]


@pytest.mark.parametrize(("pipeline", "chunks", "groups"), list(product((2, 3), (2, 3, 4), (1, 2, 5))))
def test_the_interleaved_order_is_megatrons(pipeline: int, chunks: int, groups: int) -> None:
    for rank in range(pipeline):
        got = order(rank, pipeline=pipeline, chunks=chunks, micro_batches=groups * pipeline)
        assert got == megatron(rank, pipeline, chunks, groups * pipeline)


@pytest.mark.parametrize("pipeline", [4, 6, 8])
def test_a_longer_pipeline_does_what_megatrons_does_sometimes_earlier(pipeline: int) -> None:
    # where Megatron's order waits for a forward and a backward is ready, that is done; the kinds keep their orders
    count = 3 * pipeline
    for rank in range(pipeline):
        got, theirs = order(rank, pipeline=pipeline, chunks=2, micro_batches=count), megatron(rank, pipeline, 2, count)
        for kind in ("forward", "backward"):
            assert [work for work in got if work.kind == kind] == [work for work in theirs if work.kind == kind]
        assert in_flight(got) <= in_flight(theirs)


def test_the_1f1b_order_by_hand() -> None:
    def letters(rank: int, count: int) -> str:
        return " ".join(f"{w.kind[0].upper()}{w.micro}" for w in order(rank, pipeline=3, chunks=1, micro_batches=count))

    assert letters(0, 4) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert letters(1, 4) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert letters(2, 4) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert [letters(rank, 1) for rank in range(3)] == ["F0 B0"] * 3


def test_the_ticks_of_two_ranks_by_hand() -> None:
    first, second = schedule(pipeline=2, chunks=1, micro_batches=1)
    assert first == [
        Tick(Work("forward", 0, 0), (Message("forward", 1, 0, peer=1),), ()),
        Tick(None, (), ()),
        Tick(None, (), (Message("backward", 0, 0, peer=1),)),
        Tick(Work("backward", 0, 0), (), ()),
    ]
    assert second == [
        Tick(None, (), (Message("forward", 1, 0, peer=0),)),
        Tick(Work("forward", 0, 0), (), ()),
        Tick(Work("backward", 0, 0), (Message("backward", 0, 0, peer=0),), ()),
    ]


def test_one_rank_sends_nothing() -> None:
    for chunks in (1, 3):
        (own,) = schedule(pipeline=1, chunks=chunks, micro_batches=4)
        assert all(tick.work is not None and not tick.sends and not tick.receives for tick in own)
        assert bubble([own]) == 0
        assert parked(own) == 0


@pytest.mark.parametrize(("pipeline", "chunks"), GRID)
def test_the_bubble_is_that_of_the_papers(pipeline: int, chunks: int) -> None:
    for count in MICRO_BATCHES:
        idle = bubble(schedule(pipeline=pipeline, chunks=chunks, micro_batches=count))
        least = (pipeline - 1) / (chunks * count + pipeline - 1)
        if chunks == 1 or count % pipeline == 0:
            assert idle == pytest.approx(least)
        else:
            # a last group of r < pipeline micro-batches comes round to its next chunk too early, forward and backward
            missing = pipeline - count % pipeline
            ticks = 2 * (chunks * count + pipeline - 1 + (chunks - 1) * missing)
            assert least <= idle <= 1 - 2 * chunks * count / ticks + 1e-12


def test_counting() -> None:
    forward, backward = Work("forward", 0, 0), Work("backward", 0, 0)
    assert in_flight([forward, forward, backward, forward, forward, backward]) == 3
    arriving = Tick(None, (), (Message("forward", 1, 0, 0),))
    both = Tick(None, (), (Message("forward", 1, 1, 0), Message("backward", 1, 0, 2)))
    assert parked([arriving, both, Tick(forward, (), ()), arriving]) == 3
    assert parked([arriving, Tick(forward, (), ())] * 3) == 1


def test_a_large_step_is_planned_in_no_time() -> None:
    started = time.process_time()
    ranks = schedule(pipeline=8, chunks=4, micro_batches=512)
    assert time.process_time() - started < 3
    assert bubble(ranks) == pytest.approx(7 / (4 * 512 + 7))


def duration(ranks: list[list[Tick]], *, lazily: bool, forward: int = 1, backward: int = 2) -> int:
    """When the last rank ends. Batches of a rank end one after another, each when all its partners have come to it."""
    clock, batch = [0] * len(ranks), [0] * len(ranks)
    arrived: list[dict[tuple[str, int], int]] = [{} for _ in ranks]
    for now in range(max(map(len, ranks))):
        present = [(rank, own[now]) for rank, own in enumerate(ranks) if now < len(own)]
        for rank, tick in present:
            if (work := tick.work) is not None:
                start = max(clock[rank], arrived[rank].pop((work.kind, work.micro), 0))
                clock[rank] = start + (forward if work.kind == "forward" else backward)
        posted = [max(done, ended) for done, ended in zip(clock, batch, strict=True)]
        for rank, tick in present:
            messages = [*tick.sends, *tick.receives]
            if messages:
                batch[rank] = max(posted[rank], *(posted[message.peer] for message in messages))
            for message in tick.receives:
                arrived[rank][message.kind, message.micro] = batch[rank]
            if not lazily:
                clock[rank] = max(clock[rank], batch[rank])
    return max(clock)


@pytest.mark.parametrize(("pipeline", "chunks"), [(2, 1), (4, 1), (8, 1), (2, 2), (2, 4), (4, 2), (4, 4)])
def test_ticks_of_unequal_length_cost_nothing_where_batches_are_waited_for_late(pipeline: int, chunks: int) -> None:
    for count in (pipeline, 2 * pipeline, 4 * pipeline):
        ranks = schedule(pipeline=pipeline, chunks=chunks, micro_batches=count)
        ideal = 3 * (chunks * count + pipeline - 1)
        assert duration(ranks, lazily=True) == ideal
        assert (duration(ranks, lazily=False) > ideal) == (chunks > 1)
