"""What the official release computed for a tiny AKI (tests/golden/official_aki/README.md), made ready for our model."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from aki_megatron.checkpoint.official import read_official
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.flow import IGNORE, NO_SEGMENT, Batch, Modality
from aki_megatron.model.stage import Stage, build_model

FOLDER = Path(__file__).parents[1] / "golden" / "official_aki"
IMAGE_TOKEN, PAD_TOKEN, LATENTS = 32012, 32011, 9

CONFIG = ModelConfig(
    vision=VisionConfig(image_size=56, patch_size=14, width=48, layers=2, heads=4, mlp_width=96),
    resampler=ResamplerConfig(latents=LATENTS),
    decoder=DecoderConfig(width=64, layers=3, heads=4, kv_heads=4, mlp_width=96, rope=RopeConfig()),
)


@cache
def records() -> dict[str, Tensor]:
    return load_file(FOLDER / "cases.safetensors")


def golden_model(rule: str = "mma", config: ModelConfig = CONFIG) -> Stage:
    """Our model with the recorded weights, fp32."""
    model = build_model(config, rule=rule)
    model.load_state_dict(read_official(FOLDER / "weights.safetensors", config))
    return model


@dataclass(frozen=True)
class Case:
    """One recorded case as our batch, and its numbers by name."""

    batch: Batch
    numbers: dict[str, Tensor]


def case(name: str) -> Case:
    """Read a case. Rows without ``<|assistant|>`` have no prompt: all their text is a response, as in captioning."""
    numbers = {
        key.removeprefix(f"{name}/"): value for key, value in records().items() if key.startswith(f"{name}/")
    } | {"logit_columns": records()["logit_columns"]}
    pixels = numbers.get("pixel_values")
    generating = "spans" not in numbers or "expanded_labels" not in numbers
    rows = [_expand(numbers, row, pixels is not None, generating) for row in range(len(numbers["input_ids"]))]
    length = max(len(tokens) for tokens, *_ in rows)
    columns = [
        torch.stack([_fill(row[index], length, value) for row in rows])
        for index, value in enumerate((PAD_TOKEN, Modality.PAD, NO_SEGMENT, 0, IGNORE))
    ]
    with_image = (numbers["input_ids"] == IMAGE_TOKEN).any(dim=1)
    images = torch.zeros(0, 3, 56, 56) if pixels is None else pixels.flatten(0, 2)[with_image].float()
    return Case(Batch(*columns, images), numbers)


def _fill(values: list[int], length: int, filler: int) -> Tensor:
    return torch.tensor(values + [int(filler)] * (length - len(values)))


def _expand(numbers: dict[str, Tensor], row: int, images: bool, generating: bool) -> tuple[list[int], ...]:
    """Token, modality, segment, position ids and targets of one row, the image token repeated once per latent."""
    tokens: list[int] = []
    labels: list[int] = []
    pads: list[bool] = []
    given = numbers["labels"][row] if "labels" in numbers else torch.full_like(numbers["input_ids"][row], IGNORE)
    seen = numbers["attention_mask"][row] if "attention_mask" in numbers else torch.ones_like(given)
    for token, label, valid in zip(numbers["input_ids"][row].tolist(), given.tolist(), seen.tolist(), strict=True):
        image = images and token == IMAGE_TOKEN
        times = LATENTS if image else 1
        tokens += [token] * times
        labels += [IGNORE if image else label] * times
        pads += [not valid] * times
    has_image = images and IMAGE_TOKEN in tokens
    assistant = tokens.index(32001) if 32001 in tokens and (has_image or generating) else -1
    modality = [
        Modality.PAD
        if pad
        else Modality.IMAGE
        if has_image and token == IMAGE_TOKEN
        else Modality.TEXT
        if place <= assistant
        else Modality.RESPONSE
        for place, (token, pad) in enumerate(zip(tokens, pads, strict=True))
    ]
    places = list(range(len(tokens)))
    return tokens, [int(value) for value in modality], [0] * len(tokens), places, labels[1:] + [IGNORE]
