"""attend: queries, keys and values of one layer through the fastest exact kernel for a mask.

Letters: B sequences, T positions, Hq query heads, Hkv key heads (a divisor of Hq), d head_dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from aki_megatron.attention.cpu_kernel import CPU_DTYPES, attend_masked, attend_merged
from aki_megatron.attention.dense import attend_dense
from aki_megatron.attention.mask import AttentionMask
from aki_megatron.attention.varlen_kernel import VARLEN_DTYPES, KernelError, attend_varlen

MASKED_LENGTH = 512
"""Unpacked sequences up to this length with look-ahead go to ``attend_masked`` on a CPU. It is the key block of
PyTorch's CPU flash kernel: inside one block a causal call computes all pairs anyway, so a mask costs almost nothing,
while merging costs calls (measured: docs/benchmarks/attention_cpu.md). Packed sequences are merged: a mask would
compute all pairs between segments."""

DTYPES = {"cpu": CPU_DTYPES, "cuda": (*VARLEN_DTYPES, torch.float32, torch.float64)}
"""Device type -> what attention computes in there."""

Kernel = Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]


def choose_kernel(mask: AttentionMask, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel that ``attend`` runs.

    On CUDA flash attention in half precision, and dense in float32 and float64, which serve checks. On a CPU one masked
    call for short unpacked sequences with look-ahead, merged calls otherwise.
    """
    if device.type == "cuda":
        return attend_varlen if dtype in VARLEN_DTYPES else attend_dense
    short = mask.blocks.one_segment_per_sequence and mask.shape[1] <= MASKED_LENGTH
    return attend_masked if mask.has_look_ahead and short else attend_merged


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """softmax(q k^T / sqrt(d), masked by ``mask``) v: q [B, Hq, T, d], k and v [B, Hkv, T, d] -> [B, Hq, T, d].

    Positions of no segment give 0. Raises KernelError for a device, dtype or shapes that no kernel takes.
    """
    dtypes = DTYPES.get(q.device.type, ())
    if q.dtype not in dtypes or k.dtype != q.dtype or v.dtype != q.dtype:
        raise KernelError(
            f"attention with rule {mask.attention.rule!r} on {q.device}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; "
            + (f"they must have one dtype of {dtypes}." if dtypes else f"it runs on {' and '.join(DTYPES)} only.")
        )
    _check_shapes(q, k, v, mask)
    return choose_kernel(mask, q.device, q.dtype)(q, k, v, mask)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> None:
    batch_size, heads, tokens, head_dim = q.shape
    num_kv_heads = k.shape[1]
    fits = (batch_size, tokens) == mask.shape and k.shape == v.shape == (batch_size, num_kv_heads, tokens, head_dim)
    if not fits or heads % num_kv_heads:
        raise KernelError(
            f"attention with rule {mask.attention.rule!r} on {q.device}: q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)} for a mask of {mask.shape[0]} sequences and {mask.shape[1]} positions; q must be "
            "[sequences, heads, positions, head_dim], k and v [sequences, key heads, positions, head_dim], and the key "
            "heads a divisor of the heads."
        )
