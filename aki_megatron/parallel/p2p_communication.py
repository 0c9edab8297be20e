"""What crosses a stage boundary: hidden states with their ids forward, gradients of hidden states backward.

B rows, T tokens, D width. Messages travel in the batches that schedule.py plans: every rank's batch number t is matched
by its peers' batches number t, so no order of sending and receiving can deadlock. Nothing waits before it must: a
receive is awaited when its micro-batch is taken, a send when the step ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.parallel.batch_broadcast import MicrobatchShape
from aki_megatron.parallel.schedule import Message
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import StageActivations


@dataclass
class _PendingReceive:
    """Tensors under way to this rank."""

    tensors: list[Tensor]
    works: list[dist.Work] = field(default_factory=list)


class P2PCommunicator:
    """Messages between this rank and the ranks of the neighbouring stages with its tensor and data rank.

    dtype  of hidden states and their gradients
    """

    def __init__(self, topology: Topology, *, width: int, dtype: torch.dtype) -> None:
        self._topology = topology
        self._width = width
        self._dtype = dtype
        self._parked: dict[Message, _PendingReceive] = {}
        self._sizes: Sequence[MicrobatchShape] = ()
        self._sending: list[tuple[dist.Work, Sequence[Tensor]]] = []
        self.max_buffered = 0
        """Most messages that were here, or under way to here, between two works; schedule.parked is its bound."""
        if topology.pipeline > 1:
            # NCCL builds the group's communicator in its first call, in which all of its ranks must take part
            dist.all_reduce(torch.zeros(1, device=topology.device), group=topology.pipeline_group)

    def open_step(self, sizes: Sequence[MicrobatchShape]) -> None:
        """``sizes`` of the step's micro-batches: messages need no header of their own."""
        self._sizes = sizes

    def exchange(self, sends: Sequence[tuple[Message, StageActivations | Tensor]], receives: Sequence[Message]) -> None:
        """Start one batch of sends (each with what it carries) and receives; returns at once."""
        operations: list[dist.P2POp] = []
        owners: list[_PendingReceive | Sequence[Tensor]] = []
        group = self._topology.pipeline_group
        for message, content in sends:
            tensors = [content.hidden, content.ids] if isinstance(content, StageActivations) else [content]
            tensors = [tensor.contiguous() for tensor in tensors]
            for tensor in tensors:
                operations.append(dist.P2POp(dist.isend, tensor, self._topology.peer(message.peer), group))
                owners.append(tensors)
        for message in receives:
            parcel = self._parked[message] = _PendingReceive(self._buffers(message))
            for tensor in parcel.tensors:
                operations.append(dist.P2POp(dist.irecv, tensor, self._topology.peer(message.peer), group))
                owners.append(parcel)
        self.max_buffered = max(self.max_buffered, len(self._parked))
        if not operations:
            return
        works = dist.batch_isend_irecv(operations)
        # NCCL answers a whole batch with one handle, gloo with one for each operation
        works = works * len(operations) if len(works) == 1 else works
        for owner, work in zip(owners, works, strict=True):
            if isinstance(owner, _PendingReceive):
                owner.works.append(work)
            else:
                self._sending.append((work, owner))

    def take_carry(self, message: Message) -> StageActivations:
        """Hidden states and ids of a forward message of an earlier batch."""
        hidden, ids = self._take(message)
        return StageActivations(hidden, ids)

    def take_gradient(self, message: Message) -> Tensor:
        """Gradient [B, T, D] of a backward message of an earlier batch."""
        (gradient,) = self._take(message)
        return gradient

    def close_step(self) -> None:
        """Wait until everything sent has left."""
        assert not self._parked, f"messages that no work has taken: {sorted(map(str, self._parked))}"
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _take(self, message: Message) -> list[Tensor]:
        parcel = self._parked.pop(message)
        for work in parcel.works:
            work.wait()
        self._sending = [(work, tensors) for work, tensors in self._sending if not work.is_completed()]
        return parcel.tensors

    def _buffers(self, message: Message) -> list[Tensor]:
        size, device = self._sizes[message.micro], self._topology.device
        hidden = torch.empty(size.rows, size.tokens, self._width, dtype=self._dtype, device=device)
        if message.kind == "backward":
            return [hidden]
        return [hidden, torch.empty(size.rows, size.tokens, 4, dtype=torch.int32, device=device)]
