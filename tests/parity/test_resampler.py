"""The resampler against the Perceiver written a second time, from its definition, without any of its layers."""

import pytest
import torch
from torch import Tensor

from aki_megatron.config.model import ResamplerConfig
from aki_megatron.model.resampler import PerceiverResampler

CONFIG = ResamplerConfig(num_latents=5, num_layers=3, num_heads=4, head_dim=6, mlp_ratio=3)


def normalize(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    spread = (centered.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt()
    return centered / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def reference(weights: dict[str, Tensor], media: Tensor) -> Tensor:
    """One image [P, W] -> [Q, D]."""
    heads, width = CONFIG.num_heads, CONFIG.head_dim
    x = weights["latents"]
    for layer in range(CONFIG.num_layers):
        at, ff = f"blocks.{layer}.attention", f"blocks.{layer}.feed_forward"
        latents = normalize(x, weights, f"{at}.norm_latents")
        seen = torch.cat([normalize(media, weights, f"{at}.norm_media"), latents])
        key_rows, value_rows = weights[f"{at}.key_value.weight"].split(heads * width)
        q, k, v = (
            torch.einsum("tw,hdw->htd", rows, matrix.view(heads, width, -1))
            for rows, matrix in ((latents, weights[f"{at}.query.weight"]), (seen, key_rows), (seen, value_rows))
        )
        scores = torch.einsum("hqd,hkd->hqk", q, k) / width**0.5
        weight = (scores - scores.amax(-1, keepdim=True)).exp()
        mixed = torch.einsum("hqk,hkd->qhd", weight / weight.sum(-1, keepdim=True), v).flatten(1)
        x = x + mixed @ weights[f"{at}.out.weight"].T
        inner = normalize(x, weights, f"{ff}.norm") @ weights[f"{ff}.up.weight"].T
        x = x + (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) @ weights[f"{ff}.down.weight"].T
    return normalize(x, weights, "norm") @ weights["projection.weight"].T + weights["projection.bias"]


def model(dtype: torch.dtype) -> PerceiverResampler:
    torch.manual_seed(0)
    made = PerceiverResampler(CONFIG, 16, 20).to(dtype)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return made


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_its_definition(dtype: torch.dtype, limit: float) -> None:
    resampler = model(dtype)
    media = torch.randn(3, 7, 16, dtype=dtype)
    weights = {name: tensor.detach() for name, tensor in resampler.named_parameters()}
    expected = torch.stack([reference(weights, image) for image in media])
    with torch.no_grad():
        torch.testing.assert_close(resampler(media), expected, rtol=limit, atol=limit)


def test_latents_are_among_the_keys() -> None:
    """The negative twin: an image that shuts its own keys out still leaves the latents to attend to."""
    resampler = model(torch.float64)
    media = torch.randn(1, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        kept = resampler(media)
        assert not torch.allclose(kept, resampler(media[:, :1]))
        assert resampler(media[:, :0]).isfinite().all()


def test_order_of_patches_means_nothing() -> None:
    resampler = model(torch.float64)
    media = torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(resampler(media), resampler(media.flip(1)), rtol=1e-12, atol=1e-12)
