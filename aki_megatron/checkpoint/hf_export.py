"""A model as a folder that plain transformers loads with the modelling file inside it, and back.

The folder's tensors are those of the stock folders with longer names, so a stock tensor survives bit for bit:

    model.vision_tower.*      SigLIP, instead of the published ``vision_model.``
    model.language_model.*    the language model, instead of the family's base model prefix; ``lm_head.weight``
    model.resampler.*         the resampler, with our names
    model.added_embedding.weight, lm_head.bias, lm_head_added.*      what AKI adds to a language model
"""

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.conversion_report import STRICT, AllowedMismatches, TensorMatch, match_tensors
from aki_megatron.checkpoint.hf_config import (
    decoder_config,
    language_config_json,
    read_config_json,
    vision_config,
    vision_config_json,
)
from aki_megatron.checkpoint.model_card import draw_example, model_card
from aki_megatron.checkpoint.readers import open_safetensors
from aki_megatron.checkpoint.shapes import check_shapes, model_shapes
from aki_megatron.checkpoint.tensors import NameTable, TensorSource, cast, to_external, to_native
from aki_megatron.checkpoint.weight_names import LM_HEAD, language_names, vision_names
from aki_megatron.checkpoint.writers import SHARD_BYTES, write_shards
from aki_megatron.config.attention import AttentionConfig, export_refusal
from aki_megatron.config.combinations import AUDIO_EXPORT_REFUSAL
from aki_megatron.config.data import OFFICIAL_IMAGES, SYSTEM_MESSAGE, ImagesConfig
from aki_megatron.config.model import ModelConfig, ResamplerConfig
from aki_megatron.data.tokenizer import grow_tokenizer
from aki_megatron.errors import CheckpointError, ConfigError
from aki_megatron.families.base import IMAGE_TOKEN
from aki_megatron.families.registry import FAMILIES

CONFIGURATION, MODELLING = "configuration_aki.py", "modeling_aki.py"
PROCESSING, IMAGE_PROCESSING = "processing_aki.py", "image_processing_aki.py"
"""Files beside this one that are copied into the folder; the second line with a tokenizer only."""

MODEL_CARD, EXAMPLE_IMAGE = "README.md", "example.png"
"""What the Hugging Face Hub shows of the folder, and the image in its example."""

ADDED_NAMES = {
    "input_embedder.token_embedding.added_tokens": "model.added_embedding.weight",
    "lm_head.base.bias": "lm_head.bias",
    "lm_head.added_tokens.weight": "lm_head_added.weight",
    "lm_head.added_tokens.bias": "lm_head_added.bias",
}
"""Native -> exported names of what AKI adds to a language model."""

DECODER_KEYS = {
    "vocab_size": "base_vocab_size",
    "num_added_tokens": "num_added_tokens",
    "lm_head_bias": "lm_head_bias",
}
"""Field of model.decoder -> key of the exported config.json, beside ``text_config``."""

RESAMPLER_KEYS = {
    "num_latents": "num_image_tokens",
    "num_layers": "resampler_num_layers",
    "num_heads": "resampler_num_heads",
    "head_dim": "resampler_head_dim",
    "mlp_ratio": "resampler_mlp_ratio",
    "norm_eps": "resampler_norm_eps",
}
"""Field of model.resampler -> key of the exported config.json."""

EARLIER_KEY = "base_tokens"
"""Key that only folders of an earlier version have; their tensors have other names."""


def export_names(config: ModelConfig) -> NameTable:
    """Return native name -> names in the exported folder."""
    base = FAMILIES[config.decoder.family].weights.base_model_prefix
    table = dict(vision_names(config.vision, "model.vision_tower."))
    for native, external in language_names(config.decoder).items():
        table[native] = tuple("model.language_model." + name.removeprefix(base) for name in external)
    if LM_HEAD in table:
        table[LM_HEAD] = ("lm_head.weight",)
    for native in model_shapes(config):
        if native.startswith("input_embedder.resampler."):
            table[native] = ("model." + native.removeprefix("input_embedder."),)
        elif native in ADDED_NAMES:
            table[native] = (ADDED_NAMES[native],)
    return table


def export(
    source: TensorSource,
    config: ModelConfig,
    attention: AttentionConfig,
    tokenizer: Path | None,
    out: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    system_message: str = SYSTEM_MESSAGE,
    images: ImagesConfig = OFFICIAL_IMAGES,
) -> None:
    """Write the folder: weights, config.json, modelling file; with a tokenizer also it, the processor, a model card.

    source       every tensor of the model under its native name
    attention    the rule that the model was trained under
    tokenizer    a tokenizer folder; None: write weights and modelling file only
    out          folder to write into; a staging folder, which nobody reads yet
    dtype        precision of the weights; None keeps each tensor's own
    shard_bytes  largest file of weights
    system_message  of the chat template; the one that the model was trained with
    images       how the processor makes pixels; as the model was trained

    One tensor is in memory at a time.

    Raises ConfigError where the modelling file cannot run the attention rule or lacks an encoder; CheckpointError where
    the tensors or the tokenizer are not those of the model.
    """
    refuse_audio(config)
    if refusal := export_refusal(attention):
        raise ConfigError(f"{refusal}. Export a model that was trained under causal or mma.")
    shapes = model_shapes(config)
    check_shapes({name: spec.shape for name, spec in source.specs.items()}, shapes, "the model to be exported")
    out.mkdir(parents=True, exist_ok=True)
    config_json = export_config_json(config, attention)
    if tokenizer is not None:
        config_json["image_token_id"] = write_processor(tokenizer, config, out, system_message, images)
    external = to_external(source, export_names(config), config.decoder)
    if dtype is not None:
        external = cast(external, dtype)
    dtypes = {spec.dtype for spec in external.specs.values()}
    saved_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    files.write_json(out / "config.json", config_json | {"dtype": str(saved_dtype).removeprefix("torch.")})
    if tokenizer is not None:
        card = model_card(config, attention, saved_dtype, system_message, images)
        (out / MODEL_CARD).write_text(card, encoding="utf-8")
        (out / EXAMPLE_IMAGE).write_bytes(draw_example())
    _copy(CONFIGURATION, out)
    _copy(MODELLING, out)
    write_shards(out, external, shard_bytes=shard_bytes)


def refuse_audio(config: ModelConfig) -> None:
    """Raise ConfigError for a model with an audio encoder, which no external format here can hold."""
    if config.audio is not None:
        raise ConfigError(f"model.audio is set, and {AUDIO_EXPORT_REFUSAL}. Evaluate and serve the checkpoint itself.")


def export_config_json(config: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """Return the config.json of the folder, without the precision of its weights."""
    decoder, module = config.decoder, MODELLING.removesuffix(".py")
    model = f"{module}.AkiForConditionalGeneration"
    return {
        "model_type": "aki",
        "transformers_version": transformers_version(),
        "architectures": ["AkiForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION.removesuffix('.py')}.AkiConfig",
            "AutoModel": f"{module}.AkiModel",
            "AutoModelForCausalLM": model,
            "AutoModelForImageTextToText": model,
        },
        "vision_config": vision_config_json(config.vision),
        "text_config": language_config_json(decoder),
        **{key: getattr(config.resampler, name) for name, key in RESAMPLER_KEYS.items()},
        **{key: getattr(decoder, name) for name, key in DECODER_KEYS.items()},
        "image_token_id": decoder.vocab_size,
        "attention_rule": attention.rule,
        "tie_word_embeddings": decoder.tie_word_embeddings,
    }


def write_processor(
    tokenizer: Path,
    config: ModelConfig,
    out: Path,
    system_message: str = SYSTEM_MESSAGE,
    images: ImagesConfig = OFFICIAL_IMAGES,
) -> int:
    """Write the tokenizer with AKI's tokens, the processors, and the generation settings; return the id of <image>.

    Raises CheckpointError where the tokenizer has other tokens than the model; DataError where it cannot be read.
    """
    decoder, chat = config.decoder, FAMILIES[config.decoder.family].chat
    vocabulary = grow_tokenizer(tokenizer, out)
    tokens = vocabulary.vocab_size + vocabulary.num_added_tokens
    if tokens != decoder.total_vocab_size or (decoder.num_added_tokens and vocabulary.vocab_size != decoder.vocab_size):
        raise CheckpointError(
            f"The tokenizer {tokenizer} has {vocabulary.vocab_size} + {vocabulary.num_added_tokens} tokens, the model "
            f"{decoder.vocab_size} + {decoder.num_added_tokens}; give the tokenizer that the model was trained with."
        )
    (out / "chat_template.jinja").write_text(chat.chat_template(system_message), encoding="utf-8")
    backend = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    end_of_text = backend.id_to_token(vocabulary.eos_id)
    assert end_of_text is not None
    stop_ids = [backend.token_to_id(token) for token in dict.fromkeys((end_of_text, *chat.stop_tokens))]
    processor = {
        "processor_class": "AkiProcessor",
        "auto_map": {"AutoProcessor": f"{PROCESSING.removesuffix('.py')}.AkiProcessor"},
        "num_image_tokens": config.resampler.num_latents,
        "image_token": IMAGE_TOKEN,
        "system_message": system_message,
        "response_start": chat.response_start,
        "response_ends": list(dict.fromkeys((chat.turn_end, chat.sample_end, end_of_text))),
    }
    files.write_json(out / "processor_config.json", processor)
    size = config.vision.image_size
    image_processor = {
        "image_processor_type": "AkiImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{IMAGE_PROCESSING.removesuffix('.py')}.AkiImageProcessor"},
        "size": {"height": size, "width": size},
        **images.model_dump(mode="json"),
    }
    files.write_json(out / "preprocessor_config.json", image_processor)
    generation = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": [token_id for token_id in stop_ids if token_id is not None],
        "pad_token_id": vocabulary.pad_id,
        "do_sample": False,
        "transformers_version": transformers_version(),
    }
    files.write_json(out / "generation_config.json", generation)
    _copy(PROCESSING, out)
    _copy(IMAGE_PROCESSING, out)
    return vocabulary.image_id


def exported_system_message(folder: Path) -> str:
    """Return the system message of a folder's chat template; AKI's where the folder has no processor."""
    return str(_read_settings(folder / "processor_config.json").get("system_message", SYSTEM_MESSAGE))


def exported_images(folder: Path) -> ImagesConfig:
    """Return how a folder's image processor makes pixels; AKI's way where the folder has none."""
    path = folder / "preprocessor_config.json"
    settings = _read_settings(path)
    known = {name: settings[name] for name in ImagesConfig.model_fields if name in settings}
    try:
        return ImagesConfig.model_validate(known)
    except ValueError as error:
        raise CheckpointError(f"{path} holds other image settings than to-hf writes ({error}); export again.") from None


def _read_settings(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is no file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(settings, dict), "a list or a value"
        return settings
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{path} is not a JSON object ({error}); export again.") from None


def transformers_version() -> str:
    """Return the installed release, which exported folders name as the one that wrote them."""
    return metadata.version("transformers")


def _copy(name: str, out: Path) -> None:
    shutil.copyfile(Path(__file__).with_name(name), out / name)


class Exported(NamedTuple):
    """An exported folder, read back."""

    source: TensorSource
    """Tensors under their native names."""
    config: ModelConfig
    rule: str
    """Attention rule."""
    match: TensorMatch


def exported_source(folder: Path, allowed: AllowedMismatches = STRICT) -> Exported:
    """Open an exported folder.

    allowed  exceptions from strictness, by name

    Raises CheckpointError where it is no exported folder, was written by an earlier version, or its tensors are not
    those of the model that it describes; ConfigError where it describes a model that is not supported.
    """
    config_json, path = read_config_json(folder), folder / "config.json"
    if (model_type := config_json.get("model_type")) != "aki":
        raise CheckpointError(f"{path} has model_type={model_type}, not aki; give a folder that to-hf wrote.")
    if EARLIER_KEY in config_json:
        raise CheckpointError(
            f"{path} has the key {EARLIER_KEY}: an earlier version wrote the folder, with other tensor names. Export "
            "its checkpoint again: python tools/convert.py to-hf CHECKPOINT --out FOLDER."
        )
    keys = (*DECODER_KEYS.values(), "attention_rule", *RESAMPLER_KEYS.values())
    if missing := [key for key in keys if key not in config_json]:
        raise CheckpointError(f"{path} has no {', '.join(missing)}; give a folder that to-hf wrote.")
    config = ModelConfig(
        vision=vision_config(folder),
        resampler=ResamplerConfig(**{name: config_json[key] for name, key in RESAMPLER_KEYS.items()}),
        decoder=decoder_config(folder, **{name: config_json[key] for name, key in DECODER_KEYS.items()}),
    )
    external = open_safetensors(folder)
    found = match_tensors(
        external.specs, export_names(config), model_shapes(config), source=str(folder), allowed=allowed
    )
    return Exported(to_native(external, found.table), config, config_json["attention_rule"], found)
