"""Tiny random models of every family, exported; and prompts with several images, several turns and none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aki_megatron.checkpoint.hf_export import export
from aki_megatron.checkpoint.modeling_aki import AkiForConditionalGeneration
from aki_megatron.checkpoint.tensors import TensorFact, View
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
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
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {"num_kv_heads": 4, "rope": LONGROPE},
    "llama": {"tie_word_embeddings": True, "rope": LLAMA3},
    "qwen2": {"tie_word_embeddings": True, "norm_eps": 1e-6, "rope": RopeConfig(theta=1e6)},
    "qwen3": {"norm_eps": 1e-6, "rope": RopeConfig(theta=1e6)},
}
"""Each family with what is special about the models that are used."""

Row = tuple[list[int], list[int]]
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
    values |= {"vocab_size": 40, "num_added_tokens": 2, "family": family} | FAMILIES[family] | decoder
    return ModelConfig(
        vision=VisionConfig(
            image_size=12, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24
        ),
        resampler=ResamplerConfig(num_latents=LATENTS, num_layers=2, num_heads=2, head_dim=8),
        decoder=DecoderConfig(**values),
    )


def random_stage(sizes: ModelConfig, rule: str = "mma") -> Stage:
    """The same random weights under every rule; norms and biases are moved so that a forgotten one is noticed."""
    stage = build_model(sizes, rule=rule)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in stage.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return stage.eval()


def source_of(stage: Stage) -> View:
    own = dict(stage.named_parameters())
    return View(
        {name: TensorFact(tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()},
        {name: lambda name=name: own[name].detach() for name in own},  # type: ignore[misc]
    )


def write(stage: Stage, folder: Path, **settings: Any) -> Path:
    export(source_of(stage), stage.config, stage.rule, settings.pop("tokenizer", None), folder, **settings)
    return folder


def load(folder: Path, backend: str = "sdpa") -> AkiForConditionalGeneration:
    return AkiForConditionalGeneration.from_pretrained(folder, attn_implementation=backend).eval()


def row(*parts: int | tuple[int, int]) -> Row:
    """A text of parts: IMAGE, or (modality, tokens)."""
    tokens: list[int] = []
    modality: list[int] = []
    for part in parts:
        kind, count = part if isinstance(part, tuple) else (part, LATENTS)
        tokens += [IMAGE_TOKEN] * count if kind == IMAGE else torch.randint(0, PAD_TOKEN, (count,)).tolist()
        modality += [kind] * count
    return tokens, modality


def prompts() -> tuple[list[Row], list[Tensor]]:
    """Four prompts and the pictures [n, 3, 12, 12] of each: one, none, two in two turns, one at the end."""
    torch.manual_seed(1)
    rows = [
        row((TEXT, 3), IMAGE, (TEXT, 6)),
        row((TEXT, 5)),
        row((TEXT, 2), IMAGE, (TEXT, 4), (RESPONSE, 3), (TEXT, 2), IMAGE, (TEXT, 3)),
        row((TEXT, 8), IMAGE, (TEXT, 1)),
    ]
    return rows, [torch.randn(modality.count(IMAGE) // LATENTS, 3, 12, 12) for _, modality in rows]


def batch(rows: Sequence[Row], pixels: Tensor) -> Batch:
    """As our own model takes it: right padded; what is answered is learnt."""
    width = max(len(tokens) for tokens, _ in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (width - len(values))

    targets = [
        [token if kind == RESPONSE else IGNORE for token, kind in zip(tokens[1:], modality[1:], strict=True)]
        for tokens, modality in rows
    ]
    return Batch(
        torch.tensor([padded(tokens, PAD_TOKEN) for tokens, _ in rows]),
        torch.tensor([padded(modality, Modality.PAD) for _, modality in rows], dtype=torch.int8),
        torch.tensor([padded([0] * len(tokens), NO_SEGMENT) for tokens, _ in rows], dtype=torch.int32),
        torch.tensor([padded(list(range(len(tokens))), 0) for tokens, _ in rows], dtype=torch.int32),
        torch.tensor([padded(target, IGNORE) for target in targets]),
        pixels,
    )


def inputs(rows: Sequence[Row], pixels: Tensor, side: str = "left") -> dict[str, Tensor]:
    """As the processor gives it."""
    width = max(len(tokens) for tokens, _ in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        filling = [filler] * (width - len(values))
        return filling + values if side == "left" else values + filling

    given = {
        "input_ids": torch.tensor([padded(tokens, PAD_TOKEN) for tokens, _ in rows]),
        "attention_mask": torch.tensor([padded([1] * len(tokens), 0) for tokens, _ in rows]),
        "modality_ids": torch.tensor([padded(modality, int(Modality.PAD)) for _, modality in rows]),
    }
    return given | ({"pixel_values": pixels} if len(pixels) else {})
