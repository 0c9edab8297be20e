"""A tiny model with a tokenizer and pictures, for the tests of the attention analysis."""

import io
from functools import cache, partial
from pathlib import Path

import torch
from chat_folders import PHI3_LIKE
from PIL import Image
from torch import Tensor

from aki_megatron.attention.reference_mask import reference_mask
from aki_megatron.checkpoint.hf_export import export
from aki_megatron.checkpoint.tensors import LazyTensors, TensorSpec
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.data.image import ImageOptions
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.evaluate.model_loading import LoadedModel
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.decoder import Attention
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import Batch, Conversation, MediaItem, Modality, Placeholder, Turn, image_items, stack_ids

LATENTS, SIDE = 4, 3
"""Latents of an image (a square number, for cca), and patches on a side of its grid."""

TURNS = (
    Turn(
        "Is the  cup left of this ? And that ?",
        "no",
        (Placeholder(7, Modality.IMAGE), Placeholder(29, Modality.IMAGE)),
    ),
    Turn("What is it then?", ""),
)
"""Two images inside the first of two turns."""


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(PHI3_LIKE, FAMILIES["phi3"].chat)


def template(*, text_first: bool = False) -> Template:
    return Template(tokenizer(), {Modality.IMAGE: LATENTS}, 512, "Be brief.", text_first)


def model(rule: str = "mma", *, num_layers: int = 3, num_kv_heads: int = 2) -> Stage:
    """Random weights that are large enough for probabilities to differ."""
    words = tokenizer()
    decoder = DecoderConfig(
        hidden_size=32,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        intermediate_size=48,
        padded_vocab_size=words.num_tokens,
        vocab_size=words.image_id,
        num_added_tokens=words.num_tokens - words.image_id,
        rope=RopeConfig(),
    )
    config = ModelConfig(
        vision=VisionConfig(
            image_size=4 * SIDE, patch_size=4, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24
        ),
        resampler=ResamplerConfig(num_latents=LATENTS, num_layers=2, num_heads=2, head_dim=8),
        decoder=decoder,
    )
    stage = build_model(config, attention=AttentionConfig(rule=rule))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return stage.eval()


def picture(seed: int = 0, width: int = 24, height: int = 12) -> bytes:
    """A PNG of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator).to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


def ask(prompt: str) -> Conversation:
    return Conversation("test/one", (Turn(prompt, ""),), image_items(picture()))


def two_turns() -> Conversation:
    return Conversation("test/two", TURNS, tuple(MediaItem(Modality.IMAGE, picture(seed)) for seed in (1, 2)))


def eager(stage: Stage, batch: Batch, layer: int) -> Tensor:
    """All probabilities [B, H, T, T] of a layer by a dense mask that shares nothing with the capture."""
    seen: list[tuple[Tensor, ...]] = []
    attention = stage.layers[str(layer)].attention
    assert isinstance(attention, Attention)
    handle = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        stage.logits(batch.token_ids, stack_ids(batch), batch.media)
        handle.remove()
        q, k, _ = attention.project(*seen[0])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    mask = reference_mask(batch.modality_ids, batch.segment_ids, stage.attention, LATENTS)[:, None]
    logits = (q.double() @ k.double().transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return logits.softmax(dim=-1).nan_to_num(0.0)


def write_folder(stage: Stage, folder: Path) -> Path:
    """Write the model as tools/convert.py to-hf does."""
    parameters = {name: tensor.detach() for name, tensor in stage.named_parameters()}
    source = LazyTensors(
        {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in parameters.items()},
        {name: partial(parameters.__getitem__, name) for name in parameters},
    )
    export(source, stage.config, stage.attention, PHI3_LIKE, folder, system_message="Be brief.")
    return folder


def saved(stage: Stage) -> LoadedModel:
    return LoadedModel(Path("model"), stage, template(), ImageOptions())
