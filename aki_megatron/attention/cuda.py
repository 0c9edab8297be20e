"""The CUDA kernel: variable-length flash attention of PyTorch (sm80 and newer); FlashAttention 3 on sm90 if installed.

bfloat16 and float16 only: that is what the flash kernels take.
Letters: B rows, T tokens, Hq query heads, Hkv key heads, d head width.
"""

import importlib.util
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from aki_megatron.attention.mask import AttentionMask
from aki_megatron.attention.varlen import run_varlen
from aki_megatron.attention.varlen_plan import VarlenCall, plan_varlen
from aki_megatron.errors import UserError


class KernelError(UserError):
    """A PyTorch or a GPU without the kernel that is needed."""


def attend_cuda(q: Tensor, k: Tensor, v: Tensor, layout: AttentionMask, *, merged: bool | None = None) -> Tensor:
    """Exact attention under a layout: q [B, Hq, T, d], k and v [B, Hkv, T, d] -> [B, Hq, T, d], token-major.

    ``merged`` forces one of the two forms of varlen_plan.py; None takes the cheaper one.
    """
    plan = layout.made(("cuda", q.device, merged), lambda: plan_varlen(layout.pieces, q.device, merged=merged))
    return run_varlen(q, k, v, plan, torch_varlen(q.device))


class TorchVarlen:
    """The door to PyTorch's variable-length flash attention."""

    def __init__(self, varlen_attn: Any, implementation: str) -> None:
        self._varlen_attn = varlen_attn
        # PyTorch 2.13 asks for this word when heads differ; older ones do not know it and need no word
        self._grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
        self.implementation = implementation

    @staticmethod
    def _window(call: VarlenCall) -> tuple[int, int]:
        return (-1, 0) if call.causal else (-1, -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
        """[N, Hq, d], differentiable."""
        grouped = {"enable_gqa": True} if self._grouped and q.shape[1] != k.shape[1] else {}
        sizes = (call.cu_rows, call.cu_columns, call.max_rows, call.max_columns)
        return self._varlen_attn(q, k, v, *sizes, window_size=self._window(call), **grouped)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        """Output [N, Hq, d] and log-sum-exp [Hq, N]."""
        left, right = self._window(call)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, call.cu_rows, call.cu_columns, call.max_rows, call.max_columns, 0.0, call.causal, False,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv."""
        left, right = self._window(call)
        # without dropout the kernel reads no random state, but wants one
        random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, call.cu_rows, call.cu_columns, call.max_rows, call.max_columns, 0.0, call.causal,
            random_state, unused, window_size_left=left, window_size_right=right,
        )  # fmt: skip


@cache
def torch_varlen(device: torch.device) -> TorchVarlen:
    """The kernel for a device, looked up once. On sm90 FlashAttention 3 is switched on for the process if installed."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise KernelError(
            f"attention backend 'cuda' needs torch.nn.attention.varlen, which PyTorch {torch.__version__} lacks; "
            "install PyTorch 2.11 or newer, or choose backend 'dense'."
        ) from error
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise KernelError(
            f"attention backend 'cuda' needs compute capability 8.0 or newer, {device} "
            f"({torch.cuda.get_device_name(device)}) has {capability[0]}.{capability[1]}; choose backend 'dense'."
        )
    implementation = "FA2"
    if capability[0] == 9 and importlib.util.find_spec("flash_attn_interface") is not None:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
        implementation = "FA3"
    return TorchVarlen(varlen_attn, implementation)
