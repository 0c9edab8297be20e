"""Tiny random models of every family, exported; and prompts with one, several and no images and turns."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aki_megatron.checkpoint.hf_export import export
from aki_megatron.checkpoint.modeling_aki import AkiForConditionalGeneration
from aki_megatron.checkpoint.processing_aki import AkiProcessor
from aki_megatron.checkpoint.tensors import LazyTensors, TensorSpec
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.evaluate import generation_check
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality

LATENTS, PAD_TOKEN, IMAGE_TOKEN = 3, 39, 40
TEXT, RESPONSE, IMAGE = int(Modality.TEXT), int(Modality.RESPONSE), int(Modality.IMAGE)

LONGROPE = RopeConfig(
    rope_type="longrope",
    theta=1000.0,
    max_position_embeddings=128,
    original_max_position_embeddings=32,
    short_factor=(1.0, 1.1, 1.3, 1.7),
    long_factor=(1.1, 3.0, 12.0, 30.0),
)
LLAMA3 = RopeConfig(
    rope_type="llama3",
    theta=500.0,
    max_position_embeddings=256,
    original_max_position_embeddings=16,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
DECODERS: dict[str, dict[str, Any]] = {
    "phi3": {"num_kv_heads": 4, "rope": LONGROPE},
    "llama": {"tie_word_embeddings": True, "rope": LLAMA3},
    "qwen2": {"tie_word_embeddings": True, "norm_eps": 1e-6, "rope": RopeConfig(theta=1e6)},
    "qwen3": {"norm_eps": 1e-6, "rope": RopeConfig(theta=1e6)},
}
"""Family -> the settings in which its published models differ from the others."""

Tokens = tuple[list[int], list[int]]
"""Token and modality ids of one text."""


def config(family: str, **decoder: Any) -> ModelConfig:
    values = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 48,
        "padded_vocab_size": 45,
    }
    values |= {"vocab_size": 40, "num_added_tokens": 2, "family": family} | DECODERS[family] | decoder
    return ModelConfig(
        vision=VisionConfig(
            image_size=12, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24
        ),
        resampler=ResamplerConfig(num_latents=LATENTS, num_layers=2, num_heads=2, head_dim=8),
        decoder=DecoderConfig(**values),
    )


def random_stage(model_config: ModelConfig, rule: str = "mma") -> Stage:
    """Random weights, the same under every rule; norms and biases differ from one and zero, so tests notice them."""
    stage = build_model(model_config, attention=AttentionConfig(rule=rule))
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in stage.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return stage.eval()


def source_of(stage: Stage) -> LazyTensors:
    parameters = dict(stage.named_parameters())
    return LazyTensors(
        {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in parameters.items()},
        {name: lambda name=name: parameters[name].detach() for name in parameters},  # type: ignore[misc]
    )


def write(stage: Stage, folder: Path, **settings: Any) -> Path:
    export(source_of(stage), stage.config, stage.attention, settings.pop("tokenizer", None), folder, **settings)
    return folder


def open_processor(folder: Path) -> AkiProcessor:
    """The folder's processor, of this package's classes; AutoProcessor copies the folder's files into a cache."""
    processor = generation_check.open_processor(folder, lambda name: import_module(f"aki_megatron.checkpoint.{name}"))
    assert isinstance(processor, AkiProcessor)
    return processor


def load(folder: Path, backend: str = "sdpa") -> AkiForConditionalGeneration:
    return AkiForConditionalGeneration.from_pretrained(folder, attn_implementation=backend).eval()


def random_tokens(*parts: int | tuple[int, int]) -> Tokens:
    """Random tokens of parts: IMAGE, or (modality, number of tokens)."""
    tokens: list[int] = []
    modality: list[int] = []
    for part in parts:
        modality_id, count = part if isinstance(part, tuple) else (part, LATENTS)
        tokens += [IMAGE_TOKEN] * count if modality_id == IMAGE else torch.randint(0, PAD_TOKEN, (count,)).tolist()
        modality += [modality_id] * count
    return tokens, modality


def prompts() -> tuple[list[Tokens], list[Tensor]]:
    """Four prompts and the images [N, 3, 12, 12] of each: one, none, two in two turns, one at the end."""
    torch.manual_seed(1)
    texts = [
        random_tokens((TEXT, 3), IMAGE, (TEXT, 6)),
        random_tokens((TEXT, 5)),
        random_tokens((TEXT, 2), IMAGE, (TEXT, 4), (RESPONSE, 3), (TEXT, 2), IMAGE, (TEXT, 3)),
        random_tokens((TEXT, 8), IMAGE, (TEXT, 1)),
    ]
    return texts, [torch.randn(modality.count(IMAGE) // LATENTS, 3, 12, 12) for _, modality in texts]


def batch(texts: Sequence[Tokens], pixels: Tensor) -> Batch:
    """The batch that our model takes: right padded, responses supervised."""
    length = max(len(tokens) for tokens, _ in texts)

    def padded(values: list[int], pad_value: int) -> list[int]:
        return values + [pad_value] * (length - len(values))

    targets = [
        [token if modality_id == RESPONSE else IGNORE for token, modality_id in zip(tokens, modality, strict=True)][1:]
        for tokens, modality in texts
    ]
    return Batch(
        torch.tensor([padded(tokens, PAD_TOKEN) for tokens, _ in texts]),
        torch.tensor([padded(modality, Modality.PAD) for _, modality in texts], dtype=torch.int8),
        torch.tensor([padded([0] * len(tokens), NO_SEGMENT) for tokens, _ in texts], dtype=torch.int32),
        torch.tensor([padded(list(range(len(tokens))), 0) for tokens, _ in texts], dtype=torch.int32),
        torch.tensor([padded(shifted, IGNORE) for shifted in targets]),
        {Modality.IMAGE: pixels},
    )


def inputs(texts: Sequence[Tokens], pixels: Tensor, side: str = "left") -> dict[str, Tensor]:
    """What the exported processor returns."""
    length = max(len(tokens) for tokens, _ in texts)

    def padded(values: list[int], pad_value: int) -> list[int]:
        padding = [pad_value] * (length - len(values))
        return padding + values if side == "left" else values + padding

    model_inputs = {
        "input_ids": torch.tensor([padded(tokens, PAD_TOKEN) for tokens, _ in texts]),
        "attention_mask": torch.tensor([padded([1] * len(tokens), 0) for tokens, _ in texts]),
        "modality_ids": torch.tensor([padded(modality, int(Modality.PAD)) for _, modality in texts]),
    }
    return model_inputs | ({"pixel_values": pixels} if len(pixels) else {})
