"""Folders of golden values: what the official release's code computed, and its inputs as a Batch.

A folder holds ``config.json`` (sizes and token ids), ``weights.safetensors`` (official names) and
``cases.safetensors``: keys ``CASE/QUANTITY`` as listed in tests/golden/official_aki/README.md. Sizes, token ids, and
the names and number of cases are read from the folder.

B sequences, T positions after each image token was expanded to one position per latent.
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
from aki_megatron.checkpoint.shapes import check_shapes, model_shapes
from aki_megatron.checkpoint.tensors import to_native
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality

INPUTS = {"pixel_values", "input_ids", "attention_mask", "labels"}
"""Inputs of a case; everything else that it records is compared."""


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids that structure a recorded sequence."""

    image: int
    pad: int
    assistant: int


@dataclass(frozen=True)
class GoldenCase:
    """One recorded case."""

    recorded: Mapping[str, Tensor]
    """Inputs and outputs by name."""
    logit_columns: Tensor
    """Token ids whose logits are recorded."""
    batch: Batch
    """The inputs."""

    @property
    def valid(self) -> Tensor:
        """bool [B, T], False on padding."""
        return self.batch.modality_ids != Modality.PAD


class GoldenFolder:
    """An opened folder of golden values. Raises CheckpointError for one that is incomplete or of another form."""

    def __init__(self, folder: Path) -> None:
        missing = [
            name
            for name in ("config.json", "weights.safetensors", "cases.safetensors")
            if not (folder / name).is_file()
        ]
        if missing:
            raise CheckpointError(
                f"{folder} is no folder of golden values: {', '.join(missing)} missing. Give a folder with "
                "config.json, weights.safetensors and cases.safetensors, as tests/golden/official_aki."
            )
        self._weights = open_safetensors(folder / "weights.safetensors")
        pooling = any(name.startswith("vision_encoder.head.") for name in self._weights.specs)
        self.config, self.tokens = _read_config(folder / "config.json", pooling)
        try:
            self._records = load_file(folder / "cases.safetensors")
        except SafetensorError as error:
            raise CheckpointError(
                f"{folder / 'cases.safetensors'} is not readable ({error}); fetch it again."
            ) from error
        self.case_names = sorted({key.split("/")[0] for key in self._records if "/" in key})
        if not self.case_names:
            raise CheckpointError(f"{folder / 'cases.safetensors'} records no case: its keys must be CASE/QUANTITY.")

    def model(self, rule: str = "mma") -> Stage:
        """Our model with the recorded weights, fp32. Raises CheckpointError where they are not those of config.json."""
        table, shapes = official_names(self.config), model_shapes(self.config)
        found = {name: spec.shape for name, spec in self._weights.specs.items()}
        check_shapes(found, {table[name][0]: shape for name, shape in shapes.items()}, str(self._weights.path))
        native = to_native(self._weights, table)
        model = build_model(self.config, attention=AttentionConfig(rule=rule))
        model.load_state_dict({name: native.get(name) for name in native.specs})
        return model

    def case(self, name: str) -> GoldenCase:
        """Read a case. Raises CheckpointError where an input is missing."""
        recorded = {key[len(name) + 1 :]: value for key, value in self._records.items() if key.startswith(f"{name}/")}
        if "input_ids" not in recorded or "logit_columns" not in self._records:
            raise CheckpointError(f"{name}/input_ids or logit_columns is missing from cases.safetensors; record it.")
        return GoldenCase(recorded, self._records["logit_columns"], _batch(recorded, self.config, self.tokens))


def _read_config(path: Path, pooling: bool) -> tuple[ModelConfig, SpecialTokens]:
    try:
        config_json = json.loads(path.read_text(encoding="utf-8"))
        decoder = _decoder(config_json)
        tokens = SpecialTokens(
            config_json["token_ids"]["<image>"], config_json["pad_token_id"], config_json["token_ids"]["<|assistant|>"]
        )
        return ModelConfig(
            vision=_vision(config_json["vision"], pooling),
            resampler=_resampler(config_json["resampler"]),
            decoder=decoder,
        ), tokens
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON, or holds a size that no model has ({error}).") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is incomplete ({error}); write it as tests/golden/official_aki/config.json."
        ) from error


def _vision(config_json: Mapping[str, Any], pooling: bool) -> VisionConfig:
    return VisionConfig(
        image_size=config_json["image_size"],
        patch_size=config_json["patch_size"],
        hidden_size=config_json["hidden_size"],
        num_layers=config_json["num_hidden_layers"],
        num_heads=config_json["num_attention_heads"],
        intermediate_size=config_json["intermediate_size"],
        norm_eps=config_json["layer_norm_eps"],
        pooling_head=pooling,
    )


def _resampler(config_json: Mapping[str, Any]) -> ResamplerConfig:
    return ResamplerConfig(
        num_latents=config_json["num_latents"],
        num_layers=config_json["depth"],
        num_heads=config_json["heads"],
        head_dim=config_json["dim_head"],
        mlp_ratio=config_json["ff_mult"],
        norm_eps=config_json["layer_norm_eps"],
    )


def _decoder(config_json: Mapping[str, Any]) -> DecoderConfig:
    language = config_json["lang"]
    if language["architecture"] != "Phi3ForCausalLM":
        raise CheckpointError(
            f"config.json describes a {language['architecture']}; the official release is a Phi3ForCausalLM, "
            "give golden values of one."
        )
    return DecoderConfig(
        hidden_size=language["hidden_size"],
        num_layers=language["num_hidden_layers"],
        num_heads=language["num_attention_heads"],
        num_kv_heads=language["num_key_value_heads"],
        intermediate_size=language["intermediate_size"],
        norm_eps=language["rms_norm_eps"],
        padded_vocab_size=language["embedding_rows"],
        vocab_size=config_json["initial_tokenizer_len"],
        num_added_tokens=config_json["output_vocab"] - config_json["initial_tokenizer_len"],
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
    """The inputs of a case as a Batch, right-padded to the longest expanded sequence."""
    pixels = recorded.get("pixel_values")
    latents = 0 if pixels is None else config.resampler.num_latents
    sequences = [_expand(recorded, index, latents, tokens) for index in range(len(recorded["input_ids"]))]
    length = max(len(ids) for ids, *_ in sequences)
    padding = (tokens.pad, int(Modality.PAD), NO_SEGMENT, 0, IGNORE)
    token_ids, modality_ids, segment_ids, position_ids, targets = (
        torch.tensor([columns[number] + [value] * (length - len(columns[number])) for columns in sequences])
        for number, value in enumerate(padding)
    )
    size = config.vision.image_size
    images = torch.zeros(0, 3, size, size)
    if pixels is not None:
        # a sequence without an image token has an image too, which is not used
        images = pixels.flatten(0, 2)[(recorded["input_ids"] == tokens.image).any(dim=1)].float()
    return Batch(token_ids, modality_ids, segment_ids, position_ids, targets, {Modality.IMAGE: images})


def _expand(recorded: Mapping[str, Tensor], index: int, latents: int, tokens: SpecialTokens) -> tuple[list[int], ...]:
    """Token, modality, segment, position ids and targets of one sequence, its image token repeated per latent (if any).

    Text up to the first assistant marker is prompt, after it response; without one all of it is a response (a caption).
    Padding inside the sequence keeps its segment id, as in the release's masks.
    """
    given = recorded["input_ids"][index]
    labels = recorded["labels"][index] if "labels" in recorded else torch.full_like(given, IGNORE)
    valid = recorded["attention_mask"][index] if "attention_mask" in recorded else torch.ones_like(given)
    ids: list[int] = []
    modalities: list[int] = []
    expected: list[int] = []
    in_prompt = tokens.assistant in given
    for token, label, is_valid in zip(given.tolist(), labels.tolist(), valid.tolist(), strict=True):
        is_image = latents > 0 and token == tokens.image
        text = Modality.TEXT if in_prompt else Modality.RESPONSE
        modality = Modality.PAD if not is_valid else Modality.IMAGE if is_image else text
        repeats = latents if is_image else 1
        ids += [token] * repeats
        modalities += [int(modality)] * repeats
        expected += [IGNORE if is_image else label] * repeats
        in_prompt = in_prompt and token != tokens.assistant
    return ids, modalities, [0] * len(ids), list(range(len(ids))), [*expected[1:], IGNORE]
