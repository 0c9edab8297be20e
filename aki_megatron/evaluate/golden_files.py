"""A folder of golden numbers: what the official release's code computed, and the inputs as a batch of ours.

The folder holds ``config.json`` (sizes and token ids), ``weights.safetensors`` (names of the release) and
``cases.safetensors``: keys ``CASE/QUANTITY`` as tests/golden/official_aki/README.md lists them. Sizes, token ids, and
the names and number of cases are the folder's own.

B rows, L places of a row once each image token stands once per latent, M places that are not padding.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aki_megatron.checkpoint.official import official_names
from aki_megatron.checkpoint.readers import open_safetensors
from aki_megatron.checkpoint.tensors import to_native
from aki_megatron.checkpoint.weight_names import check_shapes, model_shapes
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality

INPUTS = {"pixel_values", "input_ids", "attention_mask", "labels"}
"""What a case gives; everything else that it records is compared."""


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids that give a recorded row its structure."""

    image: int
    pad: int
    assistant: int


@dataclass(frozen=True)
class Case:
    """One recorded case: what it records by name, and its inputs as a batch of ours."""

    recorded: Mapping[str, Tensor]
    columns: Tensor
    """Which logits are recorded."""
    batch: Batch

    @property
    def valid(self) -> Tensor:
        """[B, L] bool, places that are not padding."""
        return self.batch.modality_ids != Modality.PAD


class Golden:
    """A folder of golden numbers. Raises CheckpointError for one that is incomplete or of another form."""

    def __init__(self, folder: Path) -> None:
        missing = [
            name
            for name in ("config.json", "weights.safetensors", "cases.safetensors")
            if not (folder / name).is_file()
        ]
        if missing:
            raise CheckpointError(
                f"{folder} is no folder of golden numbers: {', '.join(missing)} missing. Give a folder with "
                "config.json, weights.safetensors and cases.safetensors, as tests/golden/official_aki."
            )
        self._weights = open_safetensors(folder / "weights.safetensors")
        pooling = any(name.startswith("vision_encoder.head.") for name in self._weights.facts)
        self.config, self.tokens = _read_config(folder / "config.json", pooling)
        try:
            self._records = load_file(folder / "cases.safetensors")
        except SafetensorError as error:
            raise CheckpointError(
                f"{folder / 'cases.safetensors'} is not readable ({error}); fetch it again."
            ) from error
        self.cases = sorted({key.split("/")[0] for key in self._records if "/" in key})
        """Names of the cases."""
        if not self.cases:
            raise CheckpointError(f"{folder / 'cases.safetensors'} records no case: its keys must be CASE/QUANTITY.")

    def model(self, rule: str = "mma") -> Stage:
        """Our model with the recorded weights, fp32. CheckpointError where they do not fit config.json."""
        table, shapes = official_names(self.config), model_shapes(self.config)
        got = {name: fact.shape for name, fact in self._weights.facts.items()}
        check_shapes(got, {table[name][0]: shape for name, shape in shapes.items()}, str(self._weights.path))
        ours = to_native(self._weights, table)
        model = build_model(self.config, rule=rule)
        model.load_state_dict({name: ours.get(name) for name in ours.facts})
        return model

    def case(self, name: str) -> Case:
        """One case. CheckpointError where an input is missing."""
        recorded = {key[len(name) + 1 :]: value for key, value in self._records.items() if key.startswith(f"{name}/")}
        if "input_ids" not in recorded or "logit_columns" not in self._records:
            raise CheckpointError(f"{name}/input_ids or logit_columns is missing from cases.safetensors; record it.")
        return Case(recorded, self._records["logit_columns"], _batch(recorded, self.config, self.tokens))


def _read_config(path: Path, pooling: bool) -> tuple[ModelConfig, SpecialTokens]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        decoder = _decoder(described)
        tokens = SpecialTokens(
            described["token_ids"]["<image>"], described["pad_token_id"], described["token_ids"]["<|assistant|>"]
        )
        return ModelConfig(
            vision=_vision(described["vision"], pooling), resampler=_resampler(described["resampler"]), decoder=decoder
        ), tokens
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON, or holds a size that no model has ({error}).") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say {error}; write it as tests/golden/official_aki/config.json does."
        ) from error


def _vision(described: Mapping[str, Any], pooling: bool) -> VisionConfig:
    return VisionConfig(
        image_size=described["image_size"],
        patch_size=described["patch_size"],
        hidden_size=described["hidden_size"],
        num_layers=described["num_hidden_layers"],
        num_heads=described["num_attention_heads"],
        intermediate_size=described["intermediate_size"],
        norm_eps=described["layer_norm_eps"],
        pooling_head=pooling,
    )


def _resampler(described: Mapping[str, Any]) -> ResamplerConfig:
    return ResamplerConfig(
        num_latents=described["num_latents"],
        num_layers=described["depth"],
        num_heads=described["heads"],
        head_dim=described["dim_head"],
        mlp_ratio=described["ff_mult"],
        norm_eps=described["layer_norm_eps"],
    )


def _decoder(described: Mapping[str, Any]) -> DecoderConfig:
    language = described["lang"]
    if language["architecture"] != "Phi3ForCausalLM":
        raise CheckpointError(
            f"config.json describes a {language['architecture']}; the official release is a Phi3ForCausalLM, "
            "give golden numbers of one."
        )
    return DecoderConfig(
        hidden_size=language["hidden_size"],
        num_layers=language["num_hidden_layers"],
        num_heads=language["num_attention_heads"],
        num_kv_heads=language["num_key_value_heads"],
        intermediate_size=language["intermediate_size"],
        norm_eps=language["rms_norm_eps"],
        padded_vocab_size=language["embedding_rows"],
        vocab_size=described["initial_tokenizer_len"],
        num_added_tokens=described["output_vocab"] - described["initial_tokenizer_len"],
        rope=_rope(language),
    )


def _rope(language: Mapping[str, Any]) -> RopeConfig:
    scaling = language["rope_scaling"]
    if not scaling:
        return RopeConfig(theta=language["rope_theta"])
    return RopeConfig(
        rope_type="longrope",
        theta=language["rope_theta"],
        max_position_embeddings=language["max_position_embeddings"],
        original_max_position_embeddings=language["original_max_position_embeddings"],
        short_factor=tuple(scaling["short_factor"]),
        long_factor=tuple(scaling["long_factor"]),
    )


def _batch(recorded: Mapping[str, Tensor], config: ModelConfig, tokens: SpecialTokens) -> Batch:
    """The inputs of a case as our data room would have written them, right padded to the longest expanded row."""
    pixels = recorded.get("pixel_values")
    latents = 0 if pixels is None else config.resampler.num_latents
    rows = [_expand(recorded, row, latents, tokens) for row in range(len(recorded["input_ids"]))]
    length = max(len(ids) for ids, *_ in rows)
    fillers = (tokens.pad, int(Modality.PAD), NO_SEGMENT, 0, IGNORE)
    token_ids, modality_ids, segment_ids, position_ids, targets = (
        torch.tensor([row[column] + [filler] * (length - len(row[column])) for row in rows])
        for column, filler in enumerate(fillers)
    )
    size = config.vision.image_size
    images = torch.zeros(0, 3, size, size)
    if pixels is not None:
        # a row without an image token has a picture too, which is not used
        images = pixels.flatten(0, 2)[(recorded["input_ids"] == tokens.image).any(dim=1)].float()
    return Batch(token_ids, modality_ids, segment_ids, position_ids, targets, images)


def _expand(recorded: Mapping[str, Tensor], row: int, latents: int, tokens: SpecialTokens) -> tuple[list[int], ...]:
    """Token, modality, segment, position ids and targets of one row, its image token standing once per latent (if any).

    Text up to the first assistant marker is prompt, after it response; without one all of it is a response (a caption).
    Padding inside the row stays in its segment, as the release's masks have it.
    """
    given = recorded["input_ids"][row]
    labels = recorded["labels"][row] if "labels" in recorded else torch.full_like(given, IGNORE)
    live = recorded["attention_mask"][row] if "attention_mask" in recorded else torch.ones_like(given)
    ids: list[int] = []
    modalities: list[int] = []
    expected: list[int] = []
    prompt = tokens.assistant in given
    for token, label, seen in zip(given.tolist(), labels.tolist(), live.tolist(), strict=True):
        image = latents > 0 and token == tokens.image
        kind = Modality.PAD if not seen else Modality.IMAGE if image else Modality.TEXT if prompt else Modality.RESPONSE
        times = latents if image else 1
        ids += [token] * times
        modalities += [int(kind)] * times
        expected += [IGNORE if image else label] * times
        prompt = prompt and token != tokens.assistant
    return ids, modalities, [0] * len(ids), list(range(len(ids))), [*expected[1:], IGNORE]
