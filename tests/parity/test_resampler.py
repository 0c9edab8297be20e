"""The resampler against an independent implementation of the Perceiver from its definition."""

import pytest
import torch
from torch import Tensor

from aki_megatron.config.model import ResamplerConfig
from aki_megatron.model.resampler import PerceiverResampler

CONFIG = ResamplerConfig(num_latents=5, num_layers=3, num_heads=4, head_dim=6, mlp_ratio=3)


def normalize(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt()
    return centered / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def reference(weights: dict[str, Tensor], media: Tensor) -> Tensor:
    """One image [P, W] -> [Q, D]."""
    heads, head_dim = CONFIG.num_heads, CONFIG.head_dim
    x = weights["latents"]
    for layer in range(CONFIG.num_layers):
        at, ff = f"layers.{layer}.attention", f"layers.{layer}.mlp"
        latents = normalize(x, weights, f"{at}.norm_latents")
        keys = torch.cat([normalize(media, weights, f"{at}.norm_media"), latents])
        k_proj, v_proj = weights[f"{at}.kv_proj.weight"].split(heads * head_dim)
        q, k, v = (
            torch.einsum("tw,hdw->htd", features, matrix.view(heads, head_dim, -1))
            for features, matrix in (
                (latents, weights[f"{at}.q_proj.weight"]),
                (keys, k_proj),
                (keys, v_proj),
            )
        )
        scores = torch.einsum("hqd,hkd->hqk", q, k) / head_dim**0.5
        weight = (scores - scores.amax(-1, keepdim=True)).exp()
        mixed = torch.einsum("hqk,hkd->qhd", weight / weight.sum(-1, keepdim=True), v).flatten(1)
        x = x + mixed @ weights[f"{at}.out_proj.weight"].T
        inner = normalize(x, weights, f"{ff}.norm") @ weights[f"{ff}.up_proj.weight"].T
        x = x + (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) @ weights[f"{ff}.down_proj.weight"].T
    return normalize(x, weights, "norm") @ weights["projection.weight"].T + weights["projection.bias"]


def model(dtype: torch.dtype) -> PerceiverResampler:
    torch.manual_seed(0)
    resampler = PerceiverResampler(CONFIG, 16, 20).to(dtype)
    with torch.no_grad():
        for tensor in resampler.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return resampler


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_its_definition(dtype: torch.dtype, limit: float) -> None:
    resampler = model(dtype)
    media = torch.randn(3, 7, 16, dtype=dtype)
    weights = {name: tensor.detach() for name, tensor in resampler.named_parameters()}
    expected = torch.stack([reference(weights, image) for image in media])
    with torch.no_grad():
        torch.testing.assert_close(resampler(media), expected, rtol=limit, atol=limit)


def test_latents_are_among_the_keys() -> None:
    """Without image features the latents still attend to themselves."""
    resampler = model(torch.float64)
    media = torch.randn(1, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        kept = resampler(media)
        assert not torch.allclose(kept, resampler(media[:, :1]))
        assert resampler(media[:, :0]).isfinite().all()


def test_the_order_of_patches_does_not_matter() -> None:
    resampler = model(torch.float64)
    media = torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(resampler(media), resampler(media.flip(1)), rtol=1e-12, atol=1e-12)
