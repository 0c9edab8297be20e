"""A model as a folder that plain transformers loads with the modelling file inside it, and back.

The folder holds the tensors of the stock folders under longer names, so that what came from them goes back bit for bit:

    model.vision_tower.*      SigLIP, in place of the published ``vision_model.``
    model.language_model.*    the language model, in place of ``model.``; ``lm_head.weight`` keeps its name
    model.resampler.*         the resampler, under our names
    model.extra_embedding.weight, lm_head.bias, lm_head_extra.*      what AKI adds for its own tokens
"""

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.conversion_report import STRICT, Allowed, Match, Row, match
from aki_megatron.checkpoint.hf_config import (
    decoder_config,
    describe_language,
    describe_vision,
    read_description,
    vision_config,
)
from aki_megatron.checkpoint.readers import cast, open_safetensors
from aki_megatron.checkpoint.tensors import NameTable, TensorSource, to_external, to_native
from aki_megatron.checkpoint.weight_names import check_shapes, language_names, model_shapes, vision_names
from aki_megatron.checkpoint.writers import SHARD_BYTES, write_shards
from aki_megatron.config.model import ModelConfig, ResamplerConfig
from aki_megatron.data.chat import CHATS, IMAGE
from aki_megatron.data.tokenizer import grow_tokenizer
from aki_megatron.errors import CheckpointError

MODELLING, PROCESSING = "modeling_aki.py", "processing_aki.py"
"""Files beside this one that are copied into the folder."""

ADDED_NAMES = {
    "front.embedding.extra": "model.extra_embedding.weight",
    "head.output.bias": "lm_head.bias",
    "head.extra.weight": "lm_head_extra.weight",
    "head.extra.bias": "lm_head_extra.bias",
}
"""What AKI adds to a language model."""

RESAMPLER_KEYS = {
    "latents": "num_image_tokens",
    "layers": "resampler_layers",
    "heads": "resampler_heads",
    "head_dim": "resampler_head_dim",
    "mlp_ratio": "resampler_mlp_ratio",
    "norm_eps": "resampler_norm_eps",
}
"""Our field -> the key of config.json."""


def export_names(config: ModelConfig) -> NameTable:
    """Our names to those in the folder."""
    table = dict(vision_names(config.vision, "model.vision_tower."))
    for ours, theirs in language_names(config.decoder).items():
        table[ours] = tuple(re.sub(r"^model\.", "model.language_model.", name) for name in theirs)
    for name in model_shapes(config):
        if name.startswith("front.resampler."):
            table[name] = ("model." + name.removeprefix("front."),)
        elif name in ADDED_NAMES:
            table[name] = (ADDED_NAMES[name],)
    return table


def export(
    source: TensorSource,
    config: ModelConfig,
    rule: str,
    tokenizer: Path | None,
    out: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Row]:
    """Write the folder: weights, config.json, the modelling file, and with a tokenizer also it and the processor.

    source      all of the model's tensors under our names
    rule        the attention rule the model was trained under
    out         a folder that nobody reads yet (sinks.aside)
    dtype       precision of the weights; None keeps each tensor's own
    shard_bytes largest file of weights

    Returns what became of each tensor. One tensor is in memory at a time.
    Errors: CheckpointError where the tensors or the tokenizer are not those of the model.
    """
    shapes = model_shapes(config)
    check_shapes({name: fact.shape for name, fact in source.facts.items()}, shapes, "the model to be exported")
    out.mkdir(parents=True, exist_ok=True)
    described = describe(config, rule)
    if tokenizer is not None:
        described["image_token_id"] = write_processor(tokenizer, config, out)
    table = export_names(config)
    theirs = to_external(source, table, config.decoder)
    wanted = theirs if dtype is None else cast(theirs, dtype)
    kinds = {fact.dtype for fact in wanted.facts.values()}
    held = kinds.pop() if len(kinds) == 1 else torch.float32
    files.write_json(out / "config.json", described | {"dtype": str(held).removeprefix("torch.")})
    _copy(MODELLING, out)
    write_shards(out, wanted, shard_bytes=shard_bytes)
    return [
        Row("mapped" if len(names) == 1 else "cut", (name,), tuple(names), source.facts[name].shape)
        for name, names in table.items()
    ]


def describe(config: ModelConfig, rule: str) -> dict[str, Any]:
    """The config.json of the folder, without the precision of its weights."""
    decoder, module = config.decoder, MODELLING.removesuffix(".py")
    model = f"{module}.AkiForConditionalGeneration"
    return {
        "model_type": "aki",
        "architectures": ["AkiForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": f"{module}.AkiConfig",
            "AutoModelForCausalLM": model,
            "AutoModelForImageTextToText": model,
        },
        "vision_config": describe_vision(config.vision),
        "text_config": describe_language(decoder),
        **{key: getattr(config.resampler, ours) for ours, key in RESAMPLER_KEYS.items()},
        "image_token_id": decoder.vocab_size,
        "base_tokens": decoder.vocab_size,
        "extra_tokens": decoder.num_added_tokens,
        "head_bias": decoder.lm_head_bias,
        "attention_rule": rule,
        "tie_word_embeddings": decoder.tie_word_embeddings,
    }


def write_processor(tokenizer: Path, config: ModelConfig, out: Path) -> int:
    """Write the tokenizer with AKI's tokens, the processor, and the settings of generation; the id of <image>.

    Errors: CheckpointError where the tokenizer has other tokens than the model; DataError where it cannot be read.
    """
    decoder, chat = config.decoder, CHATS[config.decoder.family]
    vocabulary = grow_tokenizer(tokenizer, out)
    tokens = vocabulary.vocab_size + vocabulary.num_added_tokens
    if tokens != decoder.total_vocab_size or (decoder.num_added_tokens and vocabulary.vocab_size != decoder.vocab_size):
        raise CheckpointError(
            f"The tokenizer {tokenizer} has {vocabulary.vocab_size} + {vocabulary.num_added_tokens} tokens, the model "
            f"{decoder.vocab_size} + {decoder.num_added_tokens}; give the tokenizer that the model was trained with."
        )
    (out / "chat_template.jinja").write_text(chat.template(), encoding="utf-8")
    held = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    end_of_text = held.id_to_token(vocabulary.eos)
    assert end_of_text is not None
    stops = [held.token_to_id(token) for token in dict.fromkeys((end_of_text, *chat.stops))]
    processor = {
        "processor_class": "AkiProcessor",
        "auto_map": {"AutoProcessor": f"{PROCESSING.removesuffix('.py')}.AkiProcessor"},
        "image_size": config.vision.image_size,
        "num_image_tokens": config.resampler.num_latents,
        "image_token": IMAGE,
        "answer_start": chat.answer_start,
        "answer_ends": list(dict.fromkeys((chat.close, chat.final, end_of_text))),
    }
    files.write_json(out / "processor_config.json", processor)
    generation = {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": [token for token in stops if token is not None],
        "pad_token_id": vocabulary.pad,
        "do_sample": False,
    }
    files.write_json(out / "generation_config.json", generation)
    _copy(PROCESSING, out)
    return vocabulary.image


def _copy(name: str, out: Path) -> None:
    shutil.copyfile(Path(__file__).with_name(name), out / name)


class Exported(NamedTuple):
    """An exported folder, read back."""

    source: TensorSource
    config: ModelConfig
    rule: str
    match: Match


def exported_source(folder: Path, allowed: Allowed = STRICT) -> Exported:
    """An exported folder as a source of tensors under our names, the model's sizes and its attention rule.

    Errors: CheckpointError where it is no such folder or its tensors are not those of the model that it describes,
    names in ``allowed`` excepted;
    ConfigError where it describes a model that is not built here.
    """
    described = read_description(folder)
    keys = ("base_tokens", "extra_tokens", "head_bias", "attention_rule", *RESAMPLER_KEYS.values())
    if described.get("model_type") != "aki" or (absent := [key for key in keys if key not in described]):
        kind = described.get("model_type")
        what = f"model_type={kind}, not aki" if kind != "aki" else f"no {', '.join(absent)}"
        raise CheckpointError(f"{folder / 'config.json'} says {what}; give a folder that to-hf wrote.")
    config = ModelConfig(
        vision=vision_config(folder),
        resampler=ResamplerConfig(**{ours: described[key] for ours, key in RESAMPLER_KEYS.items()}),
        decoder=decoder_config(folder, **{key: described[key] for key in keys[:3]}),
    )
    theirs, table = open_safetensors(folder), export_names(config)
    found = match(theirs.facts, table, model_shapes(config), source=str(folder), allowed=allowed)
    return Exported(to_native(theirs, found.table), config, described["attention_rule"], found)
