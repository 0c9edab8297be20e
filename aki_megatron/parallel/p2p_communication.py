"""Point-to-point communication between pipeline stages: activations with their ids forward, gradients backward.

B sequences, T positions, D hidden size. Sends and receives are issued in the batches that schedule.py plans: batch t of
every rank matches batch t of its peers, so no order of sends and receives can deadlock. A receive is waited for when
its micro-batch is needed, a send when the step ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.parallel.batch_broadcast import MicrobatchShape
from aki_megatron.parallel.schedule import Message
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import StackedIds, StageActivations


@dataclass
class _PendingReceive:
    """Buffers that are being received into, and the handles of their receives."""

    buffers: list[Tensor]
    handles: list[dist.Work] = field(default_factory=list)


class P2PCommunicator:
    """Messages between this rank and the ranks of neighbouring pipeline stages with its tensor and data rank.

    dtype  of hidden states and their gradients
    """

    def __init__(self, topology: Topology, *, hidden_size: int, dtype: torch.dtype) -> None:
        self._topology = topology
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._pending_receives: dict[Message, _PendingReceive] = {}
        self._pending_sends: list[tuple[dist.Work, Sequence[Tensor]]] = []
        self._shapes: Sequence[MicrobatchShape] = ()
        if topology.pipeline > 1:
            # NCCL creates the group's communicator in its first call, in which all of its ranks must take part
            dist.all_reduce(torch.zeros(1, device=topology.device), group=topology.pipeline_group)

    def begin_step(self, shapes: Sequence[MicrobatchShape]) -> None:
        """Set the shapes of the step's micro-batches; messages carry no header."""
        self._shapes = shapes

    def exchange(self, sends: Sequence[tuple[Message, StageActivations | Tensor]], receives: Sequence[Message]) -> None:
        """Start one batch of sends (each with its content) and receives, and return without waiting."""
        operations: list[dist.P2POp] = []
        owners: list[_PendingReceive | Sequence[Tensor]] = []
        group = self._topology.pipeline_group
        for message, content in sends:
            tensors = [content.hidden, content.ids.stacked] if isinstance(content, StageActivations) else [content]
            tensors = [tensor.contiguous() for tensor in tensors]
            for tensor in tensors:
                operations.append(dist.P2POp(dist.isend, tensor, self._topology.peer(message.peer), group))
                owners.append(tensors)
        for message in receives:
            receive = self._pending_receives[message] = _PendingReceive(self._buffers(message))
            for tensor in receive.buffers:
                operations.append(dist.P2POp(dist.irecv, tensor, self._topology.peer(message.peer), group))
                owners.append(receive)
        if not operations:
            return
        handles = dist.batch_isend_irecv(operations)
        # NCCL returns one handle for the batch, gloo one for each operation
        handles = handles * len(operations) if len(handles) == 1 else handles
        for owner, handle in zip(owners, handles, strict=True):
            if isinstance(owner, _PendingReceive):
                owner.handles.append(handle)
            else:
                self._pending_sends.append((handle, owner))

    def wait_activations(self, message: Message) -> StageActivations:
        """Return what a forward message of an earlier batch holds."""
        hidden, ids = self._wait(message)
        return StageActivations(hidden, StackedIds(ids))

    def wait_gradient(self, message: Message) -> Tensor:
        """Return the gradient [B, T, D] that a backward message of an earlier batch holds."""
        (gradient,) = self._wait(message)
        return gradient

    def end_step(self) -> None:
        """Wait until everything has been sent."""
        assert not self._pending_receives, f"unused messages: {sorted(map(str, self._pending_receives))}"
        for handle, _ in self._pending_sends:
            handle.wait()
        self._pending_sends.clear()

    def _wait(self, message: Message) -> list[Tensor]:
        receive = self._pending_receives.pop(message)
        for handle in receive.handles:
            handle.wait()
        # tensors being sent must stay alive until then
        self._pending_sends = [
            (handle, tensors) for handle, tensors in self._pending_sends if not handle.is_completed()
        ]
        return receive.buffers

    def _buffers(self, message: Message) -> list[Tensor]:
        shape, device = self._shapes[message.microbatch_index], self._topology.device
        size = (shape.num_sequences, shape.sequence_length)
        hidden = torch.empty(*size, self._hidden_size, dtype=self._dtype, device=device)
        if message.kind == "backward":
            return [hidden]
        return [hidden, torch.empty(*size, StackedIds.NUM_COLUMNS, dtype=torch.int32, device=device)]
