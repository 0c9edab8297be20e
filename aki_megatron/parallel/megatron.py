"""Layers cut over the tensor ranks, made by megatron-core. The only door to it, opened when a layer is really cut.

R rows, D width, V words of the whole vocabulary.

Every layer answers with one tensor, keeps only ``weight`` and ``bias`` in its state dict, and starts with the very
numbers that LocalLinears draws, cut by model/split. What is exchanged: sums of [.., D] after row layers and embedding,
their gradients before column layers and head, a few numbers per row in the loss; never anything V wide.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from aki_megatron.errors import ConfigError
from aki_megatron.model.linears import LinearFactory, LocalLinears
from aki_megatron.model.split import Split, cut
from aki_megatron.parallel.topology import Topology

PROVEN_VERSIONS = ("0.16.1",)
"""Versions of megatron-core whose layers are known to equal the plain ones (tests/distributed/test_tensor.py)."""


def build_linears(topology: Topology) -> LinearFactory:
    """The layers for this topology: plain ones for one tensor rank, which need no megatron-core, else cut ones.

    Errors: ConfigError when layers are to be cut and megatron-core is missing or not of a proven version.
    """
    return LocalLinears() if topology.tensor == 1 else TensorParallelLinears(topology)


class TensorParallelLinears:
    """Each tensor rank holds one cut of every layer; see LinearFactory.

    All tensor ranks must ask for the same layers in the same order, and use them in the same order. Sizes that are
    cut must be multiples of the number of tensor ranks (the configuration is checked for it).
    """

    def __init__(self, topology: Topology) -> None:
        self._megatron = _load()
        self._group = topology.tensor_group
        self._rank, self._ranks = topology.tensor_rank, topology.tensor
        self._plain = LocalLinears()
        if topology.device.type == "cpu":
            # how CUDA is to queue kernels is of no concern here; Megatron warns about it all the same, once
            self._megatron.linear.warned = True

    def column(self, inputs: int, outputs: int, *, bias: bool, std: float, parts: Sequence[int] = ()) -> nn.Module:
        """[..., inputs] -> [..., outputs / tensor ranks]: this rank's share of each part, part after part."""
        whole = self._plain.column(inputs, outputs, bias=bias, std=std, parts=parts)
        layer = self._megatron.Column(inputs, outputs, bias=bias, gather_output=False, **self._settings())
        return self._fill(layer, whole, Split(0, tuple(parts) or (outputs,)))

    def row(self, inputs: int, outputs: int, *, bias: bool, std: float) -> nn.Module:
        """[..., inputs / tensor ranks] -> [..., outputs], summed over the tensor ranks; the bias is not cut."""
        whole = self._plain.row(inputs, outputs, bias=bias, std=std)
        layer = self._megatron.Row(
            inputs, outputs, bias=bias, input_is_parallel=True, skip_bias_add=False, **self._settings()
        )
        return self._fill(layer, whole, Split(1, (inputs,)))

    def embedding(self, words: int, width: int, *, std: float) -> nn.Module:
        """Ids [...] -> vectors [..., width], each from the rank that holds its word."""
        whole = self._plain.embedding(words, width, std=std)
        return self._fill(self._megatron.Embedding(words, width, **self._settings()), whole, Split(0, (words,)))

    def head(self, width: int, words: int, *, bias: bool, std: float) -> nn.Module:
        """[..., width] -> logits of this rank's words; the input's gradient is summed by ``shared``, not here."""
        whole = self._plain.head(width, words, bias=bias, std=std)
        layer = self._megatron.Column(
            width, words, bias=bias, gather_output=False, disable_grad_reduce=True, **self._settings()
        )
        return self._fill(layer, whole, Split(0, (words,)))

    def words(self, words: int) -> range:
        """This rank's equal run of the vocabulary."""
        assert words % self._ranks == 0
        share = words // self._ranks
        return range(self._rank * share, (self._rank + 1) * share)

    def shared(self, x: Tensor) -> Tensor:
        """``x``; its gradient is the sum of the tensor ranks' gradients."""
        return _Shared.apply(x, self._group)

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy, fp32 scalar (fp64 for fp64 logits), alike on all tensor ranks.

        logits   [R, V / tensor ranks] of this rank's words; they are left as they are
        targets  [R] int64, alike on all tensor ranks, all of them words: no IGNORE
        """
        return _LossSum.apply(logits, targets, self._group, self._megatron.entropy)

    def _settings(self) -> dict[str, Any]:
        config = self._megatron.Config(
            tensor_model_parallel_size=self._ranks,
            params_dtype=torch.get_default_dtype(),
            # weights are made on torch's default device, with the numbers copied into them below
            use_cpu_initialization=True,
            perform_initialization=False,
            sequence_parallel=False,
            gradient_accumulation_fusion=False,
        )
        return {"config": config, "init_method": _no_init, "tp_group": self._group}

    def _fill(self, layer: nn.Module, whole: nn.Module, split: Split) -> nn.Module:
        """Copy this rank's cut of a plain layer into one of Megatron's."""
        # it would add an empty entry for a state that the layers here do not have to what is loaded
        layer._load_state_dict_pre_hooks.clear()
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                is_cut = name == "weight" or split.axis == 0
                share = cut(parameter, split if is_cut else None, self._rank, self._ranks)
                layer.get_parameter(name).copy_(share)
        return layer


def _no_init(weight: Tensor) -> None:
    """Never called: ``_fill`` copies the numbers."""


class _OneTensor(nn.Module):
    """Before a layer of Megatron's in a class's bases: no bias beside the output, no extra state beside the weights."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def forward(self, x: Tensor) -> Tensor:
        """What the layer says, without the bias it would have left to its caller."""
        return super().forward(x)[0]


@cache
def _load() -> SimpleNamespace:
    """What is used of megatron-core. Importing it takes seconds.

    Errors: ConfigError when it is missing or not of a proven version.
    """
    _check_version()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses Transformer Engine and Apex, which the layers here do not use
        from megatron.core import ModelParallelConfig
        from megatron.core.tensor_parallel import layers
        from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    return SimpleNamespace(
        Config=ModelParallelConfig,
        Column=type("ColumnParallel", (_OneTensor, layers.ColumnParallelLinear), {}),
        Row=type("RowParallel", (_OneTensor, layers.RowParallelLinear), {}),
        Embedding=layers.VocabParallelEmbedding,
        linear=layers.linear_with_grad_accumulation_and_async_allreduce,
        entropy=VocabParallelCrossEntropy,
    )


def _check_version() -> None:
    proven = ", ".join(PROVEN_VERSIONS)
    mend = f"Run: pip install megatron-core=={PROVEN_VERSIONS[-1]}, or set parallel.tensor=1."
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        raise ConfigError(f"parallel.tensor > 1 needs megatron-core {proven}, which is not installed. {mend}") from None
    if installed not in PROVEN_VERSIONS:
        raise ConfigError(
            f"megatron-core {installed} is installed; parallel.tensor > 1 is proven with {proven}. {mend}"
        )


class _Shared(torch.autograd.Function):
    """Identity; its gradient is summed over a group.

    Megatron's copy_to_tensor_model_parallel_region, but for any gradient: that one sums in place, which changes a
    gradient that others may hold too, and loses the sum where the gradient is not contiguous.
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


class _LossSum(torch.autograd.Function):
    """Megatron's vocab-parallel cross entropy, summed, over a given group instead of the one in its global state."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: ProcessGroup, entropy: Any) -> Tensor:
        # a copy also where nothing is cast: what follows works in place
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        highest = logits.amax(-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        share = logits.shape[-1]
        first = group.rank() * share
        elsewhere, places, predicted, sums, exponentials = entropy.calculate_predicted_logits(
            logits, targets, highest, first, first + share
        )
        numbers = torch.stack([predicted, sums])
        dist.all_reduce(numbers, group=group)
        softmax, losses = entropy.calculate_cross_entropy_loss(exponentials, *numbers)
        ctx.save_for_backward(softmax, elsewhere, places)
        ctx.entropy = entropy
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, elsewhere, places = ctx.saved_tensors
        operands = ctx.entropy.prepare_gradient_calculation_operands(softmax, elsewhere)
        table, rows, update, of_input = operands
        of_input = ctx.entropy.calculate_gradients(table, rows, places, update, of_input, gradient.expand(len(softmax)))
        return of_input, None, None, None
