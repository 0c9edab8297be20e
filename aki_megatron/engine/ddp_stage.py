"""ShardedStage without DeepSpeed: ZeRO stage 0 in float32, in which every data rank holds the whole optimizer state."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aki_megatron.attention import AttentionMask
from aki_megatron.engine.base import GradientGroup
from aki_megatron.engine.optimizer import init_moments, set_learning_rate
from aki_megatron.model.stage import Stage
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Modality, StackedIds


class DDPStage:
    """A ShardedStage that is replicated over the data ranks.

    The gradients of a parameter group lie in one flat buffer, which is averaged over the data ranks by one all-reduce.
    Each data rank then owns an equal part of it, so that norm, clipping and exchange of tied gradients count every
    element once; the parts are gathered again before the update.
    """

    def __init__(self, module: Stage, topology: Topology, optimizer: torch.optim.AdamW) -> None:
        """Move ``module`` (float32, same weights on every data rank) to this rank's device.

        optimizer  over the trainable parameters, in the groups of optimizer.parameter_groups
        """
        self.module = module.to(topology.device)
        self._topology = topology
        self._adamw = optimizer
        self._parameters = dict(module.named_parameters())
        assert all(parameter.dtype == torch.float32 for parameter in self._parameters.values())
        self._buffers = [_flat_gradients(group["params"], topology.data) for group in optimizer.param_groups]
        init_moments(optimizer, (parameter for group in optimizer.param_groups for parameter in group["params"]))

    def begin_step(self) -> None:
        pass  # parameters are always whole

    def forward(self, inputs: Tensor, ids: StackedIds, media: Mapping[Modality, Tensor], mask: AttentionMask) -> Tensor:
        return self.module(inputs, ids, media, mask=mask)

    @torch.no_grad()
    def infer(
        self,
        inputs: Tensor,
        ids: StackedIds,
        media: Mapping[Modality, Tensor],
        mask: AttentionMask,
        *,
        next_tokens: bool,
    ) -> Tensor:
        run = self.module.next_tokens if next_tokens else self.module
        return run(inputs, ids, media, mask=mask)

    def end_inference(self) -> None:
        pass

    def backward(self, output: Tensor, gradient: Tensor | None, *, is_last: bool) -> None:
        output.backward(gradient)
        if is_last and self._topology.data > 1:
            for buffer in self._buffers:
                dist.all_reduce(buffer, group=self._topology.data_group)
                buffer /= self._topology.data

    def gradients(self) -> list[GradientGroup]:
        groups = zip(self._adamw.param_groups, self._buffers, strict=True)
        rank = self._topology.data_rank
        return [
            GradientGroup(group["tensor_sharded"], group["tied"], [self._rank_parts(buffer)[rank]])
            for group, buffer in groups
        ]

    def scale_gradients(self, factor: float) -> None:
        for group in self.gradients():
            torch._foreach_mul_(group.tensors, factor)

    def optimizer_step(self, lr: float) -> None:
        if self._topology.data > 1:
            for buffer in self._buffers:
                parts = self._rank_parts(buffer)
                dist.all_gather(parts, parts[self._topology.data_rank].clone(), group=self._topology.data_group)
        set_learning_rate(self._adamw, lr)
        self._adamw.step()
        self.skip_step()

    def skip_step(self) -> None:
        torch._foreach_zero_(self._buffers)

    def get_full_param(self, name: str, moment: str | None = None) -> Tensor:
        return self._tensor(name, moment).detach().clone()

    def set_full_param(self, name: str, value: Tensor, moment: str | None = None) -> None:
        self._tensor(name, moment).data.copy_(value)

    def sync_params(self) -> None:
        pass  # the master weights are the parameters

    def set_num_updates(self, counts: Mapping[int, int]) -> None:
        for group in self._adamw.param_groups:
            for parameter in group["params"]:
                self._adamw.state[parameter]["step"].fill_(float(counts[group["update_counter"]]))

    def _tensor(self, name: str, moment: str | None) -> Tensor:
        parameter = self._parameters[name]
        return parameter if moment is None else self._adamw.state[parameter][moment]

    def _rank_parts(self, buffer: Tensor) -> list[Tensor]:
        """Return each data rank's part of a flat buffer."""
        return list(buffer.view(self._topology.data, -1))


def _flat_gradients(parameters: list[nn.Parameter], num_ranks: int) -> Tensor:
    """Return a zero buffer, divisible by ``num_ranks``; the gradients of ``parameters`` become views of it.

    Autograd accumulates into an existing gradient in place.
    """
    num_elements = sum(parameter.numel() for parameter in parameters)
    buffer = torch.zeros(-(-num_elements // num_ranks) * num_ranks, device=parameters[0].device)
    views = buffer[:num_elements].split([parameter.numel() for parameter in parameters])
    for parameter, view in zip(parameters, views, strict=True):
        parameter.grad = view.view_as(parameter)
    return buffer
