"""Who sees whom: rules, layouts, the leak certificate and the kernels that run them."""

from aki_megatron.attention.cache import LayerCache, attend_cached
from aki_megatron.attention.kernels import BackendError, attend
from aki_megatron.attention.leak_check import LeakError
from aki_megatron.attention.mask import AttentionMask
from aki_megatron.attention.token_segments import MaskError

__all__ = ["BackendError", "LayerCache", "MaskError", "LeakError", "AttentionMask", "attend", "attend_cached"]
