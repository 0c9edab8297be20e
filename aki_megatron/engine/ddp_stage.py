"""One pipeline stage without DeepSpeed: ZeRO 0 in float32, every data rank holds the whole state."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aki_megatron.attention import AttentionMask
from aki_megatron.engine import global_state
from aki_megatron.engine.base import GradientGroup
from aki_megatron.model.stage import Stage
from aki_megatron.parallel.topology import Topology


class DDPStage:
    """A stage runner that data ranks hold copies of; see aki_megatron.engine.base.ShardedStage.

    The gradients of a parameter group lie in one flat buffer, which is averaged over the data ranks by one all-reduce.
    Then each rank answers for a share of it, so that norm, clipping and exchange count every element once, and the
    shares are gathered again before the update.
    """

    def __init__(self, stage: Stage, topology: Topology, optimizer: torch.optim.AdamW) -> None:
        """Move ``stage`` (float32, same weights on every data rank) to this rank's device.

        optimizer  over the trainable parameters, in the groups that optimizer.parameter_groups makes
        """
        self.stage = stage.to(topology.device)
        self._topology = topology
        self._adamw = optimizer
        self._parameters = dict(stage.named_parameters())
        assert all(parameter.dtype == torch.float32 for parameter in self._parameters.values())
        self._buffers = [_flat_gradients(group["params"], topology.data) for group in optimizer.param_groups]
        self._create_moments()

    def begin_step(self) -> None:
        """See ShardedStage.begin_step; the weights always are whole."""

    def forward(self, inputs: Tensor, ids: Tensor, pixels: Tensor | None, layout: AttentionMask) -> Tensor:
        """See ShardedStage.forward."""
        return self.stage(inputs, ids, pixels, layout=layout)

    def backward(self, output: Tensor, gradient: Tensor | None, *, last: bool) -> None:
        """See ShardedStage.backward."""
        output.backward(gradient)
        if last and self._topology.data > 1:
            for buffer in self._buffers:
                dist.all_reduce(buffer, group=self._topology.data_group)
                buffer /= self._topology.data

    def gradients(self) -> list[GradientGroup]:
        """See ShardedStage.gradients."""
        shares = [self._shares(buffer)[self._topology.data_rank] for buffer in self._buffers]
        groups = self._adamw.param_groups
        return [
            GradientGroup(group["split"], group["tied"], [share]) for group, share in zip(groups, shares, strict=True)
        ]

    def scale_gradients(self, factor: float) -> None:
        """See ShardedStage.scale_gradients."""
        for group in self.gradients():
            torch._foreach_mul_(group.tensors, factor)

    def update(self, lr: float) -> None:
        """See ShardedStage.update."""
        if self._topology.data > 1:
            for buffer in self._buffers:
                shares = self._shares(buffer)
                dist.all_gather(shares, shares[self._topology.data_rank].clone(), group=self._topology.data_group)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.discard()

    def discard(self) -> None:
        """See ShardedStage.discard."""
        torch._foreach_zero_(self._buffers)

    def local(self, name: str, moment: str | None = None) -> Tensor:
        """See ShardedStage.local."""
        return self._held(name, moment).detach().clone()

    def put(self, name: str, value: Tensor, moment: str | None = None) -> None:
        """See ShardedStage.put."""
        self._held(name, moment).data.copy_(value)

    def refresh(self) -> None:
        """See ShardedStage.refresh; what was put is what forward passes use."""

    @property
    def updates(self) -> int:
        """See ShardedStage.updates."""
        return int(self._adamw.state[self._adamw.param_groups[0]["params"][0]]["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self._adamw.state.values():
            state["step"].fill_(float(count))

    def _held(self, name: str, moment: str | None) -> Tensor:
        parameter = self._parameters[name]
        return parameter if moment is None else self._adamw.state[parameter][moment]

    def _shares(self, buffer: Tensor) -> list[Tensor]:
        """Each data rank's part of a flat buffer."""
        return list(buffer.view(self._topology.data, -1))

    def _create_moments(self) -> None:
        """AdamW creates its state in the first step; a checkpoint may be loaded or saved before that."""
        fused = bool(self._adamw.defaults["fused"])
        for group in self._adamw.param_groups:
            for parameter in group["params"]:
                state = self._adamw.state[parameter]
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else None)
                for moment in global_state.MOMENTS:
                    state[moment] = torch.zeros_like(parameter, requires_grad=False)


def _flat_gradients(parameters: list[nn.Parameter], ranks: int) -> Tensor:
    """A zero buffer that divides into ``ranks`` equal shares; the gradients of ``parameters`` become views of it.

    Autograd adds to a gradient that is there in place.
    """
    elements = sum(parameter.numel() for parameter in parameters)
    buffer = torch.zeros(-(-elements // ranks) * ranks, device=parameters[0].device)
    views = buffer[:elements].split([parameter.numel() for parameter in parameters])
    for parameter, view in zip(parameters, views, strict=True):
        parameter.grad = view.view_as(parameter)
    return buffer
