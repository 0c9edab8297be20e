"""Running a plan of variable-length calls, whatever kernel answers them: the CUDA kernel, or the reference in tests.

Everything is flat and token-major: q [B * T, Hq, d], k and v [B * T, Hkv, d].
Letters: B rows, T tokens, Hq query heads, Hkv key heads, d head width, N rows of a call, K its columns.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aki_megatron.attention.varlen_plan import VarlenCall, VarlenPlan


class VarlenKernel(Protocol):
    """Variable-length flash attention: q [N, Hq, d], k and v [K, Hkv, d], pieces and causality from the call."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
        """[N, Hq, d], differentiable."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        """Output [N, Hq, d] and log-sum-exp [Hq, N] float32 or wider."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the softmax whose output and log-sum-exp over all its calls are given."""


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
        ctx.tokens = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros((ctx.tokens, *grad.shape[1:]), dtype=wide)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


def _taken(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else _TakeTokens.apply(x, index)


def _gathered(q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, kernel: VarlenKernel) -> Tensor:
    out: Tensor | None = None
    for call in plan.calls:
        part = kernel.attend(_taken(q, call.rows), _taken(k, call.columns), _taken(v, call.columns), call)
        if call.rows is None:
            return part
        out = (torch.zeros_like(q) if out is None else out).index_copy(0, call.rows, part)
    # no call at all: nobody sees anything, and the gradients are zeros, not missing
    return q * 0.0 + (k.sum() + v.sum()) * 0.0 if out is None else out


def _pick(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


class _MergedCalls(torch.autograd.Function):
    """The same mean of softmaxes as in cpu.py: parts merged by log-sum-exp, one backward per part."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, kernel: VarlenKernel) -> Tensor:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide)
        everything = torch.arange(len(q), device=q.device)
        for call in plan.calls:
            rows = everything if call.rows is None else call.rows
            part, part_lse = kernel.forward(_pick(q, call.rows), _pick(k, call.columns), _pick(v, call.columns), call)
            ours, part_lse = lse[rows], part_lse.t()
            weight = torch.sigmoid(part_lse - ours).unsqueeze(-1)
            out.index_copy_(0, rows, torch.lerp(out[rows].to(wide), part.to(wide), weight).to(out.dtype))
            lse.index_copy_(0, rows, torch.logaddexp(ours, part_lse))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.kernel = plan, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        totals = [torch.zeros_like(x, dtype=lse.dtype, memory_format=torch.contiguous_format) for x in (q, k, v)]
        everything = torch.arange(len(q), device=q.device)
        for call in ctx.plan.calls:
            rows = everything if call.rows is None else call.rows
            columns = everything if call.columns is None else call.columns
            parts = ctx.kernel.backward(
                grad.contiguous()[rows], q[rows], k[columns], v[columns], out[rows], lse[rows].t().contiguous(), call
            )
            for total, part, index in zip(totals, parts, (rows, columns, columns), strict=True):
                total.index_add_(0, index, part.to(total.dtype))
        return *(total.to(x.dtype) for total, x in zip(totals, (q, k, v), strict=True)), None, None
