"""attend: queries, keys and values of one layer through the kernel of a layout.

Letters: B rows, T tokens, Hq query heads, Hkv key heads (a divisor of Hq), d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aki_megatron.attention.cpu import DTYPES, attend_cpu, attend_cpu_masked
from aki_megatron.attention.cuda import attend_cuda
from aki_megatron.attention.dense import attend_dense
from aki_megatron.attention.flex import attend_flex
from aki_megatron.attention.mask import AttentionMask
from aki_megatron.errors import UserError

MASKED_WIDTH = 512
"""Unpacked rows up to this many tokens with look-ahead go to ``masked`` on a CPU. It is the key block of PyTorch's CPU
flash kernel: inside one block a causal call computes all pairs anyway, so a mask costs almost nothing, while merging
pieces costs calls (measured: docs/benchmarks/attention_cpu.md). Packed rows are merged: a mask would fill in all that
segments leave out."""


class BackendError(UserError):
    """A kernel that cannot do what is asked; nothing else is tried in its place."""


@dataclass(frozen=True)
class Backend:
    """A kernel and what it can do. ``devices`` and ``dtypes`` are complete: all else is refused."""

    run: Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


HALF = (torch.bfloat16, torch.float16)

BACKENDS: dict[str, Backend] = {
    "dense": Backend(attend_dense, ("cpu", "cuda"), DTYPES),
    "cpu": Backend(attend_cpu, ("cpu",), DTYPES),
    "masked": Backend(attend_cpu_masked, ("cpu",), DTYPES),
    "cuda": Backend(attend_cuda, ("cuda",), HALF),
    "flex": Backend(attend_flex, ("cuda",), (torch.float32, torch.bfloat16, torch.float16)),
}
"""dense: SDPA with the whole mask. cpu: flash pieces merged by log-sum-exp. masked: one CPU flash call with the whole
mask, for short rows. cuda: the varlen flash kernel. flex: FlexAttention, a cross-check."""


def choose(layout: AttentionMask, device: torch.device, dtype: torch.dtype) -> str:
    """The backend of ``auto``.

    On CUDA the flash kernel for the half-precision types it takes, and dense for float32 and float64, which serve
    checks. On a CPU masked for short unpacked rows with look-ahead, cpu otherwise.
    """
    if device.type == "cuda" and dtype not in HALF:
        return "dense"
    if device.type != "cpu":
        return device.type
    short = layout.pieces.one_span_per_row and layout.shape[1] <= MASKED_WIDTH
    return "masked" if layout.has_look_ahead and short else "cpu"


def attend(q: Tensor, k: Tensor, v: Tensor, layout: AttentionMask, *, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d), masked by ``layout``) v: q [B, Hq, T, d], k and v [B, Hkv, T, d] -> [B, Hq, T, d].

    Rows of no segment give 0. Raises BackendError when the backend cannot do it on this device, dtype or shape.
    """
    name = choose(layout, q.device, q.dtype) if backend == "auto" else backend
    if name not in BACKENDS:
        raise BackendError(
            f"attention backend {name!r} is unknown for device {q.device} and rule {layout.rule!r}; "
            f"choose auto or one of {sorted(BACKENDS)}."
        )
    chosen = BACKENDS[name]
    case = f"attention backend {name!r} on {q.device} with rule {layout.rule!r}"
    if q.device.type not in chosen.devices:
        able = sorted(other for other, its in BACKENDS.items() if q.device.type in its.devices)
        raise BackendError(f"{case}: it runs on {chosen.devices} only; choose auto or one of {able}.")
    if q.dtype not in chosen.dtypes or k.dtype != q.dtype or v.dtype != q.dtype:
        raise BackendError(
            f"{case}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; it takes three of one of {chosen.dtypes}. "
            "Cast them, or choose backend 'dense'."
        )
    _check_shapes(q, k, v, layout, case)
    return chosen.run(q, k, v, layout)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, layout: AttentionMask, case: str) -> None:
    batch, heads, tokens, width = q.shape
    num_kv_heads = k.shape[1]
    fits = (batch, tokens) == layout.shape and k.shape == v.shape == (batch, num_kv_heads, tokens, width)
    if not fits or heads % num_kv_heads:
        raise BackendError(
            f"{case}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} for a layout of "
            f"{layout.shape[0]} rows and {layout.shape[1]} tokens; q must be [rows, heads, tokens, width], "
            "k and v [rows, key heads, tokens, width], and the key heads a divisor of the heads."
        )
