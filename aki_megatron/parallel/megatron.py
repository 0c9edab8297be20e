"""Tensor-parallel layers of megatron-core behind LinearFactory. The only module that imports megatron-core.

S supervised positions, D hidden size, V vocabulary size.

Every layer returns one tensor, has only ``weight`` and ``bias`` in its state dict, and starts with the weights that
LocalLinears initializes, sharded by model/sharding.py. Communicated are sums of [..., D] after row layers and
embedding, their gradients before column layers and LM head, and a few numbers per supervised position in the loss;
never a tensor of size V.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from aki_megatron.errors import ConfigError
from aki_megatron.model.linears import LinearFactory, LocalLinears, first_argmax
from aki_megatron.model.sharding import ShardSpec, shard_tensor
from aki_megatron.parallel.topology import Topology

TESTED_VERSIONS = ("0.16.1",)
"""Versions of megatron-core whose layers are tested to equal the local ones (tests/distributed/test_tensor.py)."""


def build_linears(topology: Topology) -> LinearFactory:
    """Return the layers for this topology: local ones, which need no megatron-core, with one tensor rank.

    Raises ConfigError when layers are to be split and megatron-core is missing or not of a tested version.
    """
    return LocalLinears() if topology.tensor == 1 else TensorParallelLinears(topology)


class TensorParallelLinears:
    """LinearFactory that keeps one shard of every layer on each tensor rank.

    All tensor ranks must request the same layers in the same order, and run them in the same order. Sizes that are
    split must be multiples of the number of tensor ranks (the configuration is checked for it).
    """

    def __init__(self, topology: Topology) -> None:
        self._megatron = _load()
        self._group = topology.tensor_group
        self._rank, self.num_ranks = topology.tensor_rank, topology.tensor
        self._local = LocalLinears()
        if topology.device.type == "cpu":
            # Megatron would warn once about a setting that orders kernels on CUDA
            self._megatron.linear.warned = True

    def column(
        self, in_features: int, out_features: int, *, bias: bool, std: float, part_sizes: Sequence[int] = ()
    ) -> nn.Module:
        """[..., in_features] -> [..., out_features / tensor ranks]: this rank's shard of each part, part after part."""
        full = self._local.column(in_features, out_features, bias=bias, std=std, part_sizes=part_sizes)
        layer = self._megatron.Column(in_features, out_features, bias=bias, gather_output=False, **self._settings())
        return self._initialize(layer, full, ShardSpec(0, tuple(part_sizes) or (out_features,)))

    def row(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        std: float,
        init: Callable[[Tensor], Any] | None = None,
    ) -> nn.Module:
        """[..., in_features / tensor ranks] -> [..., out_features], summed over the tensor ranks; replicated bias."""
        full = self._local.row(in_features, out_features, bias=bias, std=std, init=init)
        layer = self._megatron.Row(
            in_features, out_features, bias=bias, input_is_parallel=True, skip_bias_add=False, **self._settings()
        )
        return self._initialize(layer, full, ShardSpec(1, (in_features,)))

    def embedding(self, vocab_size: int, hidden_size: int, *, std: float) -> nn.Module:
        """Ids [...] -> embeddings [..., hidden_size], each from the rank that holds its row, summed over the ranks."""
        full = self._local.embedding(vocab_size, hidden_size, std=std)
        layer = self._megatron.Embedding(vocab_size, hidden_size, **self._settings())
        return self._initialize(layer, full, ShardSpec(0, (vocab_size,)))

    def lm_head(self, hidden_size: int, vocab_size: int, *, bias: bool, std: float) -> nn.Module:
        """[..., hidden_size] -> logits of ``vocab_range``, without a reduction of the input's gradient."""
        full = self._local.lm_head(hidden_size, vocab_size, bias=bias, std=std)
        layer = self._megatron.Column(
            hidden_size, vocab_size, bias=bias, gather_output=False, disable_grad_reduce=True, **self._settings()
        )
        return self._initialize(layer, full, ShardSpec(0, (vocab_size,)))

    def vocab_range(self, vocab_size: int) -> range:
        assert vocab_size % self.num_ranks == 0
        local_size = vocab_size // self.num_ranks
        return range(self._rank * local_size, (self._rank + 1) * local_size)

    def copy_to_tensor_parallel_region(self, x: Tensor) -> Tensor:
        return _CopyToTensorParallelRegion.apply(x, self._group)

    def gather_logits(self, logits: Tensor) -> Tensor:
        parts = [torch.empty_like(logits, memory_format=torch.contiguous_format) for _ in range(self.num_ranks)]
        dist.all_gather(parts, logits.contiguous(), group=self._group)
        return torch.cat(parts, dim=-1)

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy (fp32 scalar, fp64 for fp64 logits), equal on all tensor ranks.

        logits   [S, V / tensor ranks] of this rank's ``vocab_range``; not changed
        targets  [S] int64, equal on all tensor ranks, none of them IGNORE
        """
        return _VocabParallelLossSum.apply(logits, targets, self._group, self._megatron.entropy)

    def argmax(self, logits: Tensor) -> Tensor:
        """Token id [S] int64 of the largest logit over all tensor ranks, the lowest of equal ones; equal on all."""
        local = first_argmax(logits)
        largest = logits.gather(-1, local[:, None]).squeeze(-1).float()
        token_ids = local + self._rank * logits.shape[-1]
        values, ids = ([torch.empty_like(own) for _ in range(self.num_ranks)] for own in (largest, token_ids))
        dist.all_gather(values, largest, group=self._group)
        dist.all_gather(ids, token_ids, group=self._group)
        # ranks hold ascending parts of the vocabulary, so the first of equal ones has the lowest id
        best = first_argmax(torch.stack(values, dim=-1))
        return torch.stack(ids, dim=-1).gather(-1, best[:, None]).squeeze(-1)

    def _settings(self) -> dict[str, Any]:
        config = self._megatron.Config(
            tensor_model_parallel_size=self.num_ranks,
            params_dtype=torch.get_default_dtype(),
            # parameters are created on torch's default device; their values are copied in below
            use_cpu_initialization=True,
            perform_initialization=False,
            sequence_parallel=False,
            gradient_accumulation_fusion=False,
        )
        return {"config": config, "init_method": _no_init, "tp_group": self._group}

    def _initialize(self, layer: nn.Module, full: nn.Module, spec: ShardSpec) -> nn.Module:
        """Copy this rank's shard of a full layer into Megatron's layer."""
        # the hook would demand an extra state that these layers do not have
        layer._load_state_dict_pre_hooks.clear()
        with torch.no_grad():
            for name, parameter in full.named_parameters():
                is_sharded = name == "weight" or spec.dim == 0
                shard = shard_tensor(parameter, spec if is_sharded else None, self._rank, self.num_ranks)
                layer.get_parameter(name).copy_(shard)
        return layer


def _no_init(weight: Tensor) -> None:
    """Never called: ``_initialize`` copies the weights."""


class _SingleOutput(nn.Module):
    """Mixin before a Megatron layer: return no bias beside the output, and keep no extra state beside the weights."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output without the bias that Megatron returns beside it."""
        return super().forward(x)[0]


@cache
def _load() -> SimpleNamespace:
    """Import what is used of megatron-core, which takes seconds.

    Raises ConfigError when it is missing or not of a tested version.
    """
    _check_version()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Transformer Engine and Apex, which these layers do not use
        from megatron.core import ModelParallelConfig
        from megatron.core.tensor_parallel import layers
        from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    return SimpleNamespace(
        Config=ModelParallelConfig,
        Column=type("ColumnParallel", (_SingleOutput, layers.ColumnParallelLinear), {}),
        Row=type("RowParallel", (_SingleOutput, layers.RowParallelLinear), {}),
        Embedding=layers.VocabParallelEmbedding,
        linear=layers.linear_with_grad_accumulation_and_async_allreduce,
        entropy=VocabParallelCrossEntropy,
    )


def _check_version() -> None:
    tested = ", ".join(TESTED_VERSIONS)
    fix = f"Run: pip install megatron-core=={TESTED_VERSIONS[-1]}, or set parallel.tensor=1."
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        raise ConfigError(f"parallel.tensor > 1 needs megatron-core {tested}, which is not installed. {fix}") from None
    if installed not in TESTED_VERSIONS:
        raise ConfigError(f"megatron-core {installed} is installed; parallel.tensor > 1 is tested with {tested}. {fix}")


class _CopyToTensorParallelRegion(torch.autograd.Function):
    """Identity forward, sum over the group backward.

    Megatron's copy_to_tensor_model_parallel_region for any gradient: Megatron's sums in place, which changes a gradient
    that others may hold too, and loses the sum where the gradient is not contiguous.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _VocabParallelLossSum(torch.autograd.Function):
    """Megatron's vocab-parallel cross entropy, summed, over a given group instead of the one in its global state."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: ProcessGroup, entropy: Any) -> Tensor:
        # copy even without a cast: Megatron works in place
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        logits_max = logits.amax(-1)
        dist.all_reduce(logits_max, dist.ReduceOp.MAX, group=group)
        local_size = logits.shape[-1]
        first = group.rank() * local_size
        target_mask, local_targets, predicted, sum_exp, exp_logits = entropy.calculate_predicted_logits(
            logits, targets, logits_max, first, first + local_size
        )
        reduced = torch.stack([predicted, sum_exp])
        dist.all_reduce(reduced, group=group)
        softmax, losses = entropy.calculate_cross_entropy_loss(exp_logits, *reduced)
        ctx.save_for_backward(softmax, target_mask, local_targets)
        ctx.entropy = entropy
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, target_mask, local_targets = ctx.saved_tensors
        operands = ctx.entropy.prepare_gradient_calculation_operands(softmax, target_mask)
        grad_2d, positions, softmax_update, grad_input = operands
        grad_input = ctx.entropy.calculate_gradients(
            grad_2d, positions, local_targets, softmax_update, grad_input, gradient.expand(len(softmax))
        )
        return grad_input, None, None, None
