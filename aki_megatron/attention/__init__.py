"""Who sees whom: rules, layouts, the leak certificate and the kernels that run them."""

from aki_megatron.attention.cache import LayerCache, attend_cached
from aki_megatron.attention.certificate import LeakError
from aki_megatron.attention.kernels import BackendError, attend
from aki_megatron.attention.layout import ModalityLayout
from aki_megatron.attention.reading import LayoutError

__all__ = ["BackendError", "LayerCache", "LayoutError", "LeakError", "ModalityLayout", "attend", "attend_cached"]
