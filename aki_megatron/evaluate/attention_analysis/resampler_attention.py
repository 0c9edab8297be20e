"""Which patches the latents of an image look at: probabilities of the resampler's cross-attention.

N images, P patches, Q latents, H heads, d head dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from aki_megatron.model.media_encoders import MEDIA_ENCODERS
from aki_megatron.model.resampler import PerceiverResampler, ResamplerAttention
from aki_megatron.model.stage import Stage
from aki_megatron.types import Modality

RESAMPLER_LAYERS = ("mean", "last")
"""Which of the resampler's layers say what a latent looks at: the mean over all, or the last one."""


@contextmanager
def capture_patches(model: Stage) -> Iterator[list[Tensor]]:
    """Yield a list that gets, in every pass of the model, one tensor [N, Q, P] for each layer of the image resampler.

    A latent attends to patches and to latents; the probability of a patch is a mean over heads, in fp32, and those of
    all patches together are what the latents leave of 1.
    """
    assert model.input_embedder is not None
    resampler = model.input_embedder.get_submodule(MEDIA_ENCODERS[Modality.IMAGE].resampler_name)
    assert isinstance(resampler, PerceiverResampler)
    found: list[Tensor] = []
    handles = [layer.attention.register_forward_pre_hook(_hook(found)) for layer in resampler.layers]  # type: ignore[union-attr]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hook(found: list[Tensor]) -> Callable[[ResamplerAttention, tuple[Tensor, Tensor]], Any]:
    @torch.no_grad()
    def capture(attention: ResamplerAttention, inputs: tuple[Tensor, Tensor]) -> None:
        q, k, _ = attention.project(*inputs)
        num_patches = inputs[0].shape[1]
        images = [
            (one.float() @ keys.float().transpose(-2, -1) * one.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=0)
            for one, keys in zip(q, k, strict=True)
        ]
        found.append(torch.stack([image[:, :num_patches].cpu() for image in images]) if images else torch.zeros(0))

    return capture


def join_layers(layers: list[Tensor], which: str) -> Tensor:
    """Return [N, Q, P], what a latent looks at, of the tensors of ``capture_patches``; each row sums to 1."""
    assert which in RESAMPLER_LAYERS, which
    weights = layers[-1] if which == "last" else torch.stack(layers).mean(dim=0)
    return weights / weights.sum(dim=-1, keepdim=True)
