"""The CUDA kernel: a plan of variable-length calls, answered by PyTorch's flash attention (FA 3 on sm90 if installed).

bfloat16 and float16 on sm80 and newer: that is what the flash kernels take. Everything inside is flat and token-major:
q [B * T, Hq, d], k and v [B * T, Hkv, d]. The tests run the same plans with a reference kernel.
Letters: B sequences, T positions, Hq query heads, Hkv key heads, d head_dim, Q queries of a call, K its keys.
"""

import importlib.util
import inspect
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aki_megatron.attention.mask import AttentionMask
from aki_megatron.attention.varlen_plan import VarlenCall, VarlenPlan, plan_varlen
from aki_megatron.errors import UserError

VARLEN_DTYPES = (torch.bfloat16, torch.float16)


class KernelError(UserError):
    """Attention that no kernel can run: the device, the dtype, the shapes, or a PyTorch without the kernel."""


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, merged: bool | None = None) -> Tensor:
    """Exact attention: q [B, Hq, T, d], k and v [B, Hkv, T, d] -> [B, Hq, T, d], token-major.

    ``merged`` forces one of the two forms of varlen_plan.py; None takes the cheaper one.
    """
    plan = mask.cached(("varlen", q.device, merged), lambda: plan_varlen(mask.blocks, q.device, merged=merged))
    return run_varlen(q, k, v, plan, torch_varlen(q.device))


class VarlenKernel(Protocol):
    """Variable-length flash attention: q [Q, Hq, d], k and v [K, Hkv, d], blocks and causality from the call."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
        """[Q, Hq, d], differentiable."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        """Output [Q, Hq, d] and log-sum-exp [Hq, Q], float32 or wider."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the softmax whose output and log-sum-exp over all its calls are given."""


class TorchVarlen:
    """PyTorch's variable-length flash attention."""

    def __init__(self, varlen_attn: Any, implementation: str) -> None:
        self._varlen_attn = varlen_attn
        # PyTorch 2.13 requires enable_gqa when the numbers of heads differ; older versions do not know it
        self._takes_enable_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
        self.implementation = implementation

    @staticmethod
    def _window(call: VarlenCall) -> tuple[int, int]:
        return (-1, 0) if call.causal else (-1, -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
        """[Q, Hq, d], differentiable."""
        grouped = {"enable_gqa": True} if self._takes_enable_gqa and q.shape[1] != k.shape[1] else {}
        sizes = (call.cu_queries, call.cu_keys, call.max_queries, call.max_keys)
        return self._varlen_attn(q, k, v, *sizes, window_size=self._window(call), **grouped)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        """Output [Q, Hq, d] and log-sum-exp [Hq, Q]."""
        left, right = self._window(call)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, call.cu_queries, call.cu_keys, call.max_queries, call.max_keys, 0.0, call.causal, False,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv."""
        left, right = self._window(call)
        # without dropout the kernel reads no random state, but requires the argument
        random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, call.cu_queries, call.cu_keys, call.max_queries, call.max_keys, 0.0, call.causal,
            random_state, unused, window_size_left=left, window_size_right=right,
        )  # fmt: skip


@cache
def torch_varlen(device: torch.device) -> TorchVarlen:
    """The kernel for a device. On sm90 FlashAttention 3 is activated for the process if installed.

    Raises KernelError where PyTorch or the GPU lacks it.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise KernelError(
            f"attention in half precision on CUDA needs torch.nn.attention.varlen, which PyTorch {torch.__version__} "
            "lacks; install PyTorch 2.11 or newer, or run in float32 (train.precision fp32)."
        ) from error
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise KernelError(
            f"attention in half precision needs compute capability 8.0 or newer, {device} "
            f"({torch.cuda.get_device_name(device)}) has {capability[0]}.{capability[1]}; run in float32 "
            "(train.precision fp32)."
        )
    implementation = "FA2"
    if capability[0] == 9 and importlib.util.find_spec("flash_attn_interface") is not None:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
        implementation = "FA3"
    return TorchVarlen(varlen_attn, implementation)


def run_varlen(q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, kernel: VarlenKernel) -> Tensor:
    """Attention by a plan: q [B, Hq, T, d], k and v [B, Hkv, T, d] -> [B, Hq, T, d], token-major."""
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    run = _MergedCalls.apply if plan.merged else _gathered
    out = run(flat_q, flat_k, flat_v, plan, kernel)
    return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


class _TakeTokens(torch.autograd.Function):
    """x[index], where the gradients of a token that was taken more than once are summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_tokens = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros((ctx.num_tokens, *grad.shape[1:]), dtype=wide)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else _TakeTokens.apply(x, index)


def _gathered(q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, kernel: VarlenKernel) -> Tensor:
    out: Tensor | None = None
    for call in plan.calls:
        part = kernel.attend(_take(q, call.queries), _take(k, call.keys), _take(v, call.keys), call)
        if call.queries is None:
            return part
        out = (torch.zeros_like(q) if out is None else out).index_copy(0, call.queries, part)
    # without any call the gradients must be zeros, not missing
    return q * 0.0 + (k.sum() + v.sum()) * 0.0 if out is None else out


def _select(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


class _MergedCalls(torch.autograd.Function):
    """The weighted mean of softmaxes of cpu_kernel.py: parts merged by log-sum-exp, one backward per part."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, kernel: VarlenKernel) -> Tensor:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide)
        all_tokens = torch.arange(len(q), device=q.device)
        for call in plan.calls:
            queries = all_tokens if call.queries is None else call.queries
            inputs = (_select(q, call.queries), _select(k, call.keys), _select(v, call.keys))
            part, part_lse = kernel.forward(*inputs, call)
            before, part_lse = lse[queries], part_lse.t()
            weight = torch.sigmoid(part_lse - before).unsqueeze(-1)
            out.index_copy_(0, queries, torch.lerp(out[queries].to(wide), part.to(wide), weight).to(out.dtype))
            lse.index_copy_(0, queries, torch.logaddexp(before, part_lse))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.kernel = plan, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        totals = [torch.zeros_like(x, dtype=lse.dtype, memory_format=torch.contiguous_format) for x in (q, k, v)]
        all_tokens = torch.arange(len(q), device=q.device)
        for call in ctx.plan.calls:
            queries = all_tokens if call.queries is None else call.queries
            keys = all_tokens if call.keys is None else call.keys
            of_queries = (grad.contiguous()[queries], q[queries], k[keys], v[keys], out[queries])
            parts = ctx.kernel.backward(*of_queries, lse[queries].t().contiguous(), call)
            for total, part, index in zip(totals, parts, (queries, keys, keys), strict=True):
                total.index_add_(0, index, part.to(total.dtype))
        return *(total.to(x.dtype) for total, x in zip(totals, (q, k, v), strict=True)), None, None
