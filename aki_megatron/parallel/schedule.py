"""Who does what when: the pipeline's schedule, a list of actions decided before anything is sent. Pure.

The layers are cut into S = pipeline x virtual_stages stages; chunk c of pipeline rank p is stage c * pipeline + p, so that a
micro-batch visits every rank once per chunk.

- chunks = 1 is 1F1B (PipeDream-Flush: Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", 2021). GPipe
  (Huang et al., 2019) runs all forwards first and so holds every micro-batch; 1F1B has the same bubble and holds at
  most pipeline - p of them on rank p.
- chunks > 1 is interleaved 1F1B (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
  Megatron-LM", 2021, section 2.2): micro-batches in groups of ``pipeline``, each group through one chunk after another.
  The bubble shrinks by the number of chunks, the traffic grows by it. In Megatron's fixed order ranks can wait for one
  another when the micro-batches are no multiple of the pipeline, and it refuses those; here a rank that would wait does
  what is ready, so that any number completes; a last group that is smaller costs some idle ticks.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Work:
    """One pass of one micro-batch through one chunk of a pipeline rank."""

    kind: Kind
    chunk: int
    micro: int


@dataclass(frozen=True, slots=True)
class Message:
    """What crosses a stage boundary: activations (forward) or their gradient (backward)."""

    kind: Kind
    stage: int
    """The stage that receives."""
    micro: int
    peer: int
    """Pipeline rank at the other end: the receiver of what is sent, the sender of what is received."""


@dataclass(frozen=True, slots=True)
class Tick:
    """What one pipeline rank does in one tick: work first, then one batch of sends and receives.

    A message is in ``sends`` of its sender and in ``receives`` of its receiver in the same tick, and two ranks exchange
    at most one message each way, so that batches of all ranks match and no order of arrival can deadlock.
    """

    work: Work | None
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


def order(pipeline_rank: int, *, pipeline: int, chunks: int, micro_batches: int) -> list[Work]:
    """The works of one pipeline rank in the order in which it does them."""
    ticks = schedule(pipeline=pipeline, chunks=chunks, micro_batches=micro_batches)[pipeline_rank]
    return [tick.work for tick in ticks if tick.work is not None]


def _visits(chunks: Sequence[int], pipeline: int, micro_batches: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in order: groups of ``pipeline`` micro-batches, each group through one chunk after another.

    While a rank does one group's chunk, the group's first micro-batch comes round to it for the next chunk.
    """
    if len(chunks) == 1:
        return [(0, micro) for micro in range(micro_batches)]
    return [
        (chunk, micro)
        for first in range(0, micro_batches, pipeline)
        for chunk in chunks
        for micro in range(first, min(first + pipeline, micro_batches))
    ]


def in_flight_limit(pipeline_rank: int, *, pipeline: int, chunks: int, micro_batches: int) -> int:
    """Most forwards of a rank (all its chunks together) whose backward is still to come: what its memory must hold.

    1F1B: min(pipeline - p, micro-batches). With chunks, the first group must have passed all but the last of them
    before anything runs backward, and the first gradient comes back to this rank as many ticks after the last rank as
    the activations went there before it: hence twice.
    """
    behind = pipeline - 1 - pipeline_rank
    if chunks > 1:
        behind = 2 * behind + (chunks - 1) * min(pipeline, micro_batches)
    return min(behind + 1, chunks * micro_batches)


def in_flight(works: Sequence[Work]) -> int:
    """Most forwards not yet run backward at any time, all chunks together."""
    held = most = 0
    for work in works:
        held += 1 if work.kind == "forward" else -1
        most = max(most, held)
    return most


class _Rank:
    """A pipeline rank at play: what it has still to do, and what has its input."""

    def __init__(self, pipeline_rank: int, pipeline: int, chunks: int, micro_batches: int) -> None:
        self.forwards = deque(Work("forward", *visit) for visit in _visits(range(chunks), pipeline, micro_batches))
        self.backwards = deque(
            Work("backward", *visit) for visit in _visits(range(chunks)[::-1], pipeline, micro_batches)
        )
        self.ready: set[Work] = set()
        self.room = in_flight_limit(pipeline_rank, pipeline=pipeline, chunks=chunks, micro_batches=micro_batches)

    def take(self) -> Work | None:
        """The next work: forward while there is room, else backward (so by turns once there is none); what is not ready
        gives way to what is."""
        if self.room and self.forwards and self.forwards[0] in self.ready:
            self.room -= 1
            return self.forwards.popleft()
        if self.backwards and self.backwards[0] in self.ready:
            self.room += 1
            return self.backwards.popleft()
        return None


def schedule(*, pipeline: int, chunks: int, micro_batches: int) -> list[list[Tick]]:
    """The ticks of every pipeline rank, by playing all of them in step.

    In a tick every rank does at most one work; what is made in a tick is delivered at its end. A stage hands to a stage
    of the same rank without a message. Ticks in which a rank has nothing to do are kept, except at its end.
    Ranks need not run in step. Whoever acts on this waits for a batch only before the work that needs a message of it:
    to end every batch before the next work would make each tick last as long as a backward pass, and chunks > 1 slower
    than chunks = 1.

    It always completes. Of the ranks that are least far with their backwards take the last one: the gradient it needs
    next has been made. If the forward of that micro-batch is missing, it stands within every rank's limit, so nothing
    but its own input keeps any rank from it, and the input of the first stage is always there.
    """
    assert min(pipeline, chunks, micro_batches) >= 1
    ranks = [_Rank(rank, pipeline, chunks, micro_batches) for rank in range(pipeline)]
    ranks[0].ready.update(Work("forward", 0, micro) for micro in range(micro_batches))
    ticks: list[list[Tick]] = [[] for _ in ranks]
    while any(own.backwards for own in ranks):
        works = [own.take() for own in ranks]
        assert any(works), "the pipeline ranks wait for one another"
        sends: list[list[Message]] = [[] for _ in ranks]
        receives: list[list[Message]] = [[] for _ in ranks]
        for rank, work in enumerate(works):
            target = _target(work, rank, pipeline, chunks)
            if work is None or target is None:
                continue
            kind, stage = target
            peer = stage % pipeline
            ranks[peer].ready.add(Work(kind, stage // pipeline, work.micro))
            if peer != rank:
                sends[rank].append(Message(kind, stage, work.micro, peer))
                receives[peer].append(Message(kind, stage, work.micro, rank))
        for own, work, sent, received in zip(ticks, works, sends, receives, strict=True):
            own.append(Tick(work, tuple(sent), tuple(received)))
    return [_without_idle_end(own) for own in ticks]


def _target(work: Work | None, rank: int, pipeline: int, chunks: int) -> tuple[Kind, int] | None:
    """What becomes possible by a work: the next stage forward, the previous one backward, and the last stage, which
    computes the loss, goes back by itself."""
    if work is None:
        return None
    stage = work.chunk * pipeline + rank
    if work.kind == "backward":
        return ("backward", stage - 1) if stage else None
    return ("forward", stage + 1) if stage + 1 < pipeline * chunks else ("backward", stage)


def _without_idle_end(ticks: list[Tick]) -> list[Tick]:
    last = len(ticks)
    while last and ticks[last - 1] == Tick(None, (), ()):
        last -= 1
    return ticks[:last]


def parked(ticks: Sequence[Tick]) -> int:
    """Most inputs that a rank has received and not yet begun to work on, at the end of any tick."""
    waiting: set[tuple[Kind, int]] = set()
    most = 0
    for tick in ticks:
        if tick.work is not None:
            # a micro-batch comes round for its next chunk only after this one, so there is no other it could be
            waiting.discard((tick.work.kind, tick.work.micro))
        waiting.update((message.kind, message.micro) for message in tick.receives)
        most = max(most, len(waiting))
    return most


def bubble(ticks: Sequence[Sequence[Tick]]) -> float:
    """Fraction of the ticks in which a rank has nothing to do, the same for every rank: 0 without a pipeline.

    1F1B: (pipeline - 1) / (micro-batches + pipeline - 1). ``ticks`` is what ``schedule`` returns.
    """
    longest = max(len(own) for own in ticks)
    works = sum(tick.work is not None for own in ticks for tick in own)
    return 1 - works / (longest * len(ticks))
