"""The CPU kernel: PyTorch's flash attention in few calls, merged by log-sum-exp, with a backward of our own.

Softmax over a union of keys is a weighted mean of the softmaxes over its parts; the weights follow from the log-sum-exp
of each part. PyTorch does not differentiate that quantity, so the backward is ours: every part runs the flash backward
with the *merged* output and log-sum-exp, and the gradients add up.

Queries that see nothing get output 0 and log-sum-exp +inf, so that exp(score - lse) is 0 and no gradient passes them.
The parts beyond the causal past are small, and run in the dtype of their log-sum-exp, float32 or wider: that spares a
rounding, and measured more than twice as fast as the bfloat16 backward (docs/benchmarks/attention_cpu.md).

Without look-ahead there is nothing to merge and what runs is plain causal flash attention, bit for bit.

Letters: B sequences, T positions, Hq query heads, Hkv key heads, d head_dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aki_megatron.attention.cpu_plan import Call, CpuPlan, flat_tokens, plan_masked, plan_merged, token_major
from aki_megatron.attention.mask import AttentionMask

CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What PyTorch's CPU flash kernel computes in; the log-sum-exp is float32, or float64 for float64."""

flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_merged(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Exact attention, calls merged: q [B, Hq, T, d], k and v [B, Hkv, T, d] -> [B, Hq, T, d], token-major."""
    return _MergedFlash.apply(q, k, v, mask.cached("merged", lambda: plan_merged(mask.blocks)))


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """The same in one flash call with the whole mask [B, 1, T, T], built once for all layers: for short sequences."""
    return _MergedFlash.apply(q, k, v, mask.cached(("masked", q.dtype), lambda: plan_masked(mask.dense(), q.dtype)))


class _MergedFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: CpuPlan) -> Tensor:
        q, k, v = (_readable(x, plan) for x in (q, k, v))
        out, lse = _merge([_permute(x, plan.order) for x in (q, k, v)], plan)
        out, lse = _permute(out, plan.inverse), _permute(lse, plan.inverse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: CpuPlan = ctx.plan
        grad = _readable(grad, plan)
        q, k, v, out, lse = ctx.saved_tensors
        gradients = _gradients([_permute(x, plan.order) for x in (grad, q, k, v, out, lse)], plan)
        return *(_permute(x, plan.inverse) for x in gradients), None


def _readable(x: Tensor, plan: CpuPlan) -> Tensor:
    """x [B, H, T, d] in a memory layout that the flash kernel and the plan's calls can read."""
    if plan.gathers:
        return token_major(x)
    return x if x.stride(-1) == 1 else x.contiguous()


def _fill(x: Tensor, where: tuple[Tensor, Tensor], value: float) -> None:
    """Set x [B, H, T, ...] at the given (sequence, position) pairs."""
    if len(where[0]):
        x.transpose(1, 2)[where] = value


def _permute(x: Tensor, order: Tensor | None) -> Tensor:
    """Token-major x [B, H, T, ...] with the tokens of each sequence in another order."""
    if order is None:
        return x
    tokens = x.transpose(1, 2)
    return flat_tokens(x).index_select(0, order).view(tokens.shape).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    queries, keys, values = call.queries(q).to(dtype), call.keys(k).to(dtype), call.keys(v).to(dtype)
    mask = None if call.mask is None else call.mask.to(dtype)
    return flash_forward(queries, keys, values, 0.0, call.causal, attn_mask=mask)


def _merge(inputs: list[Tensor], plan: CpuPlan) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, T, d] and log-sum-exp [B, Hq, T] over all calls, from q, k, v."""
    q, k, v = inputs
    if plan.one_base:
        out, lse = flash_forward(q, k, v, 0.0, plan.base_mask is None, attn_mask=plan.base_mask)
        out = token_major(out) if plan.gathers else out
        _fill(out, plan.padding, 0.0)
        _fill(lse, plan.padding, -torch.inf)
    else:
        batch_size, heads, tokens, head_dim = q.shape
        out = q.new_zeros(batch_size, tokens, heads, head_dim).transpose(1, 2)
        precision = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full((batch_size, tokens, heads), -torch.inf, dtype=precision).transpose(1, 2)
        for call in plan.base:
            part, part_lse = _flash(q, k, v, call, q.dtype)
            call.put_queries(out, part)
            call.put_queries(lse, part_lse)
    for call in plan.extra:
        part, part_lse = _flash(q, k, v, call, lse.dtype)
        before, before_lse = call.queries(out), call.queries(lse)
        mean = torch.lerp(before.to(lse.dtype), part, torch.sigmoid(part_lse - before_lse).unsqueeze(-1))
        call.put_queries(out, mean.to(out.dtype))
        call.put_queries(lse, torch.logaddexp(before_lse, part_lse))
    _fill(lse, plan.empty, torch.inf)
    return out, lse


def _gradients(saved: list[Tensor], plan: CpuPlan) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, token-major, from the gradient of the output, q, k, v, the output and the log-sum-exp."""
    grad, q, k, v, out, lse = saved
    if plan.one_base:
        # padding queries are in this call too, and must not contribute
        base_lse = _without_padding(lse, plan)
        parts = flash_backward(grad, q, k, v, out, base_lse, 0.0, plan.base_mask is None, attn_mask=plan.base_mask)
        dq, dk, dv = (token_major(part) for part in parts) if plan.gathers else parts
    else:
        dq, dk, dv = (x.new_zeros(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    calls = [*((call, q.dtype) for call in plan.base), *((call, lse.dtype) for call in plan.extra)]
    for call, dtype in calls:
        queries = [call.queries(x).to(dtype) for x in (grad, q, out)]
        keys = [call.keys(x).to(dtype) for x in (k, v)]
        mask = None if call.mask is None else call.mask.to(dtype)
        parts = flash_backward(
            queries[0], queries[1], *keys, queries[2], call.queries(lse), 0.0, call.causal, attn_mask=mask
        )
        call.add_queries(dq, parts[0])
        call.add_keys(dk, parts[1])
        call.add_keys(dv, parts[2])
    return dq, dk, dv


def _without_padding(lse: Tensor, plan: CpuPlan) -> Tensor:
    """The log-sum-exp with +inf also on padding queries that see keys, but not in the one base call that covers all."""
    if len(plan.padding[0]) == len(plan.empty[0]):
        return lse
    copy = lse.clone(memory_format=torch.preserve_format)
    _fill(copy, plan.padding, torch.inf)
    return copy
