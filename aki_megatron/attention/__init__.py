"""Attention masks of every rule, the leak check, and the exact kernels that run them.

A batch's ids become token_segments, a rule (rules) turns those into a MaskSpec, mask_blocks puts it into the order the
kernels run in; together they are an AttentionMask (mask). A plan (cpu_plan, varlen_plan) splits its blocks into calls
of flash attention, and a kernel (cpu_kernel, varlen_kernel) runs them; kernels chooses. reference_mask and dense are
the independent reference.
"""

from aki_megatron.attention.kernels import attend
from aki_megatron.attention.kv_cache import LayerCache, attend_cached
from aki_megatron.attention.leak_check import LeakError
from aki_megatron.attention.mask import AttentionMask
from aki_megatron.attention.token_segments import MaskError
from aki_megatron.attention.varlen_kernel import KernelError

__all__ = ["AttentionMask", "KernelError", "LayerCache", "LeakError", "MaskError", "attend", "attend_cached"]
