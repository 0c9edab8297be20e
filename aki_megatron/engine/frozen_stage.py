"""ShardedStage of a pipeline stage of which nothing trains: no optimizer, no gradients, no DeepSpeed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.engine.base import GradientGroup
from aki_megatron.engine.frozen_weights import FrozenWeights
from aki_megatron.model.stage import Stage
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Modality, StackedIds


class FrozenStage:
    """A ShardedStage without trainable parameters: an optimizer over none of them is refused by torch and DeepSpeed.

    Its weights are whole on every data rank, under every ZeRO stage: they are whole during a step anyway. In bf16 their
    float32 values are kept in host memory, partitioned over the data ranks. Gradients pass through to the stages below.
    """

    def __init__(self, module: Stage, topology: Topology, *, dtype: torch.dtype) -> None:
        """Move ``module`` (float32, same weights on every data rank) to this rank's device, in ``dtype``."""
        self.module = module
        self._parameters = dict(module.named_parameters())
        assert not any(parameter.requires_grad for parameter in self._parameters.values())
        self._float32 = None if dtype == torch.float32 else FrozenWeights(topology)
        for name, parameter in self._parameters.items():
            if self._float32 is not None:
                self._float32.set(name, parameter)
            parameter.data = parameter.data.to(topology.device, dtype)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(topology.device)  # not in dtype: rotary frequencies stay exact

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

    def gradients(self) -> list[GradientGroup]:
        return []

    def scale_gradients(self, factor: float) -> None:
        pass

    def optimizer_step(self, lr: float) -> None:
        pass

    def skip_step(self) -> None:
        pass

    def get_full_param(self, name: str, moment: str | None = None) -> Tensor:
        assert moment is None, f"{name} is frozen and has no {moment}"
        return self._parameters[name].detach().clone() if self._float32 is None else self._float32.get(name)

    def set_full_param(self, name: str, value: Tensor, moment: str | None = None) -> None:
        assert moment is None, f"{name} is frozen and has no {moment}"
        if self._float32 is not None:
            self._float32.set(name, value)
        self._parameters[name].data.copy_(value)

    def sync_params(self) -> None:
        pass

    def set_num_updates(self, counts: Mapping[int, int]) -> None:
        pass
