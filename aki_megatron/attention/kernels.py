"""attend: queries, keys and values of one layer through the kernel of a layout.

Letters: B rows, T tokens, Hq query heads, Hkv key heads (a divisor of Hq), d head width.
"""

from torch import Tensor

from aki_megatron.attention.dense import attend_dense
from aki_megatron.attention.layout import ModalityLayout


def attend(q: Tensor, k: Tensor, v: Tensor, layout: ModalityLayout, *, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d), masked by ``layout``) v: q [B, Hq, T, d], k and v [B, Hkv, T, d] -> [B, Hq, T, d]."""
    return attend_dense(q, k, v, layout)
