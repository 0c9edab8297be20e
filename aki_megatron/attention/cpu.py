"""The CPU kernel: PyTorch's flash attention in few calls, merged by log-sum-exp, with a backward written by hand.

Softmax over a union of columns is a weighted mean of the softmaxes over its parts; the weights follow from the
log-sum-exp of each part. PyTorch does not differentiate that quantity, so the backward is ours: every part runs the
flash backward with the *merged* output and log-sum-exp, and the gradients add up.

Rows that see nothing get output 0 and log-sum-exp +inf, so that exp(score - lse) is 0 and no gradient passes them.
The parts beyond the causal past are small, and run in the dtype of their log-sum-exp, float32 or wider: that spares a
rounding, and measured more than twice as fast as the bfloat16 backward (docs/benchmarks/attention_cpu.md).

Without look-ahead there is nothing to merge and what runs is plain causal flash, bit for bit.

Letters: B rows, T tokens, Hq query heads, Hkv key heads, d head width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aki_megatron.attention.cpu_plan import Call, CpuPlan, flat_tokens, plan_calls, plan_mask, token_major
from aki_megatron.attention.mask import AttentionMask

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What PyTorch's CPU flash kernel computes in; the log-sum-exp is float32, or float64 for float64."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_cpu(q: Tensor, k: Tensor, v: Tensor, layout: AttentionMask) -> Tensor:
    """Exact attention under a layout: q [B, Hq, T, d], k and v [B, Hkv, T, d] -> [B, Hq, T, d], token-major."""
    return _FlashPieces.apply(q, k, v, layout.made("cpu", lambda: plan_calls(layout.pieces)))


def attend_cpu_masked(q: Tensor, k: Tensor, v: Tensor, layout: AttentionMask) -> Tensor:
    """The same in one flash call with the whole mask [B, 1, T, T], made once for all layers: for short rows."""
    return _FlashPieces.apply(q, k, v, layout.made(("cpu", q.dtype), lambda: plan_mask(layout.dense(), q.dtype)))


class _FlashPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: CpuPlan) -> Tensor:
        q, k, v = (_readable(x, plan) for x in (q, k, v))
        out, lse = _merged([_permuted(x, plan.order) for x in (q, k, v)], plan)
        out, lse = _permuted(out, plan.inverse), _permuted(lse, plan.inverse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: CpuPlan = ctx.plan
        grad = _readable(grad, plan)
        q, k, v, out, lse = ctx.saved_tensors
        gradients = _gradients([_permuted(x, plan.order) for x in (grad, q, k, v, out, lse)], plan)
        return *(_permuted(x, plan.inverse) for x in gradients), None


def _readable(x: Tensor, plan: CpuPlan) -> Tensor:
    """x [B, H, T, d] as the flash kernel and the plan's calls can read it."""
    if plan.gathers:
        return token_major(x)
    return x if x.stride(-1) == 1 else x.contiguous()


def _fill(x: Tensor, places: tuple[Tensor, Tensor], value: float) -> None:
    """Set the given tokens of x [B, H, T, ...]."""
    if len(places[0]):
        x.transpose(1, 2)[places] = value


def _permuted(x: Tensor, order: Tensor | None) -> Tensor:
    """Token-major x [B, H, T, ...] with the tokens of each row in another order."""
    if order is None:
        return x
    tokens = x.transpose(1, 2)
    return flat_tokens(x).index_select(0, order).view(tokens.shape).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    own, seen, seen_v = call.rows(q).to(dtype), call.columns(k).to(dtype), call.columns(v).to(dtype)
    return _forward(own, seen, seen_v, 0.0, call.causal, attn_mask=None if call.mask is None else call.mask.to(dtype))


def _merged(inputs: list[Tensor], plan: CpuPlan) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, T, d] and log-sum-exp [B, Hq, T] over all calls, from q, k, v."""
    q, k, v = inputs
    if plan.whole:
        out, lse = _forward(q, k, v, 0.0, plan.mask is None, attn_mask=plan.mask)
        out = token_major(out) if plan.gathers else out
        _fill(out, plan.dead, 0.0)
        _fill(lse, plan.dead, -torch.inf)
    else:
        batch, heads, tokens, width = q.shape
        out = q.new_zeros(batch, tokens, heads, width).transpose(1, 2)
        precision = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full((batch, tokens, heads), -torch.inf, dtype=precision).transpose(1, 2)
        for call in plan.base:
            part, part_lse = _flash(q, k, v, call, q.dtype)
            call.put_rows(out, part)
            call.put_rows(lse, part_lse)
    for call in plan.extra:
        part, part_lse = _flash(q, k, v, call, lse.dtype)
        ours, ours_lse = call.rows(out), call.rows(lse)
        mean = torch.lerp(ours.to(lse.dtype), part, torch.sigmoid(part_lse - ours_lse).unsqueeze(-1))
        call.put_rows(out, mean.to(out.dtype))
        call.put_rows(lse, torch.logaddexp(ours_lse, part_lse))
    _fill(lse, plan.silent, torch.inf)
    return out, lse


def _gradients(saved: list[Tensor], plan: CpuPlan) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, token-major, from the gradient of the output, q, k, v, the output and the log-sum-exp."""
    grad, q, k, v, out, lse = saved
    if plan.whole:
        # rows of a stray or silent place are in this call too; see ``_harmless``
        quiet = _harmless(lse, plan)
        parts = _backward(grad, q, k, v, out, quiet, 0.0, plan.mask is None, attn_mask=plan.mask)
        dq, dk, dv = (token_major(part) for part in parts) if plan.gathers else parts
    else:
        dq, dk, dv = (x.new_zeros(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    work = [*((call, q.dtype) for call in plan.base), *((call, lse.dtype) for call in plan.extra)]
    for call, dtype in work:
        rows = [call.rows(x).to(dtype) for x in (grad, q, out)]
        columns = [call.columns(x).to(dtype) for x in (k, v)]
        mask = None if call.mask is None else call.mask.to(dtype)
        parts = _backward(rows[0], rows[1], *columns, rows[2], call.rows(lse), 0.0, call.causal, attn_mask=mask)
        call.add_rows(dq, parts[0])
        call.add_columns(dk, parts[1])
        call.add_columns(dv, parts[2])
    return dq, dk, dv


def _harmless(lse: Tensor, plan: CpuPlan) -> Tensor:
    """The log-sum-exp with +inf also on stray rows, which the whole base call covers but which do not look there."""
    if len(plan.dead[0]) == len(plan.silent[0]):
        return lse
    copy = lse.clone(memory_format=torch.preserve_format)
    _fill(copy, plan.dead, torch.inf)
    return copy
