"""The published language models: config.json, tensors, and logits on any number of ranks."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_ranks import BASE_VOCAB_SIZE, LATENTS, RESAMPLER, Inputs, model_of, rank_logits, text_ids
from published import LANGUAGE, VISION
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel

from aki_megatron.checkpoint.hf_config import (
    check_decoder_config,
    decoder_config,
    language_config_json,
    vision_config,
    vision_config_json,
)
from aki_megatron.checkpoint.hf_folders import language_source
from aki_megatron.checkpoint.initial_weights import load_pretrained
from aki_megatron.checkpoint.shapes import model_shapes
from aki_megatron.checkpoint.tensors import to_external, to_native
from aki_megatron.checkpoint.weight_names import language_names, vision_names
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, RopeConfig, VisionConfig
from aki_megatron.errors import CheckpointError, ConfigError
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE, Modality, StackedIds

SIGLIP = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 30,
    "patch_size": 7,
}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 80,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": None,
    "max_window_layers": 4,
}
"""Query heads, key heads, MLP and vocabulary are divisible by four tensor ranks."""
OWN_SMALL: dict[str, dict[str, Any]] = {
    "Phi-3.5-mini": {
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.7],
            "long_factor": [1.1, 3.0, 12.0, 30.0],
        },
    },
    "Llama-3.2-3B": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rope_scaling": LANGUAGE["Llama-3.2-3B"][0]["rope_scaling"] | {"original_max_position_embeddings": 512},
    },
    "Qwen2.5-3B": {"num_key_value_heads": 4},
    "Qwen3-0.6B": {"num_key_value_heads": 4, "head_dim": 16},  # as published, twice hidden_size / heads
    "Qwen3-1.7B": {"num_key_value_heads": 4},
    "Qwen3-4B": {"num_key_value_heads": 8, "head_dim": 4},
    "Qwen3-8B": {"num_key_value_heads": 4},
}
"""The published values of norms, biases, theta, tied embeddings and rotary embeddings are kept."""


def folder_with(folder: Path, described: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def small(name: str, **changed: Any) -> dict[str, Any]:
    return LANGUAGE[name][0] | SMALL | OWN_SMALL[name] | changed


def hf_config(described: Mapping[str, Any]) -> Any:
    """transformers' configuration; it changes the values it is given, so it gets a copy."""
    values = copy.deepcopy({key: value for key, value in described.items() if key != "model_type"})
    return AutoConfig.for_model(described["model_type"], **values)


def transformer(described: Mapping[str, Any]) -> Any:
    """transformers' model of a config.json; norms and biases differ from one and zero."""
    torch.manual_seed(0)
    config = hf_config(described)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model, folder = SiglipVisionModel(SiglipVisionConfig(**SIGLIP)).eval(), tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    models = {}
    for name in LANGUAGE:
        model, folder = transformer(small(name)), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        models[name] = model, folder
    return models


def tiny_whole(decoder: DecoderConfig) -> ModelConfig:
    """A model around a decoder; its encoder reads no folder."""
    return ModelConfig(
        vision=VisionConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=8),
        resampler=RESAMPLER,
        decoder=decoder,
    )


def batch() -> Inputs:
    """Two sequences of 20 positions, an image in the first; long enough for longrope's long factors."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, BASE_VOCAB_SIZE, (2, 20), generator=generator)
    modality_ids = torch.full_like(tokens, Modality.TEXT)
    tokens[0, 2 : 2 + LATENTS], modality_ids[0, 2 : 2 + LATENTS] = BASE_VOCAB_SIZE, Modality.IMAGE
    positions, targets = torch.arange(20).expand_as(tokens), torch.full_like(tokens, IGNORE)
    ids = StackedIds.stack(modality_ids, torch.zeros_like(tokens), positions, targets)
    return Inputs(tokens, ids, torch.randn(1, 3, 30, 30, generator=generator))


@torch.no_grad()
def expected_logits(language: Any, encoder: Any, config: ModelConfig, inputs: Inputs) -> Tensor:
    """transformers' encoder and language model, with the new resampler between them: [B, T, BASE_VOCAB_SIZE]"""
    hidden = language.get_input_embeddings()(inputs.tokens)
    resampler = build_model(config, attention=AttentionConfig(rule="causal")).input_embedder.resampler
    hidden[0, 2 : 2 + LATENTS] = resampler(encoder(inputs.pixels).last_hidden_state)[0]
    return language(inputs_embeds=hidden).logits[..., :BASE_VOCAB_SIZE]


@pytest.mark.distributed
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_logits_equal_transformers_on_any_number_of_ranks(run_on, languages, vision, tensor, pipeline):
    folders = {name: folder for name, (_, folder) in languages.items()}
    inputs = batch()
    answers = run_on(tensor * pipeline, rank_logits, folders, vision[1], inputs, tensor=tensor, pipeline=pipeline)
    shards = [answer for answer in answers if answer is not None]
    assert len(shards) == tensor
    for name, (model, folder) in languages.items():
        expected = expected_logits(model, vision[0], model_of(folder, vision[1]), inputs)
        got = torch.cat([shard[name] for shard in shards], dim=-1)[..., :BASE_VOCAB_SIZE]
        difference = float((got - expected).abs().max())
        print(f"{name}: {difference:.1e} of {float(expected.abs().max()):.1f}")
        assert difference <= 1e-4, name


def without_bias(stage: Stage) -> None:
    stage.layers["1"].attention.qkv_proj.bias.zero_()


def without_key_norm(stage: Stage) -> None:
    stage.layers["1"].attention.k_norm.weight.fill_(1)


def with_default_rope(stage: Stage) -> None:
    stage.rotary.config = RopeConfig(theta=stage.rotary.config.theta)


def untied(stage: Stage) -> None:
    stage.lm_head.base.weight = torch.nn.Parameter(torch.randn_like(stage.lm_head.base.weight))


@pytest.mark.parametrize(
    ("name", "remove"),
    [
        ("Phi-3.5-mini", with_default_rope),
        ("Llama-3.2-3B", with_default_rope),
        ("Llama-3.2-3B", untied),
        ("Qwen2.5-3B", without_bias),
        ("Qwen3-8B", without_key_norm),
    ],
)
def test_a_missing_trait_changes_the_logits(languages, vision, name, remove) -> None:
    """Negative counterpart of the equality above: without a trait the difference is far above the tolerance."""
    model, folder = languages[name]
    config, inputs = model_of(folder, vision[1]), batch()
    stage = build_model(config, attention=AttentionConfig(rule="causal"))
    load_pretrained(stage, vision=vision[1], language=folder)
    with torch.no_grad():
        remove(stage)
        got = stage.logits(inputs.tokens, inputs.ids, {Modality.IMAGE: inputs.pixels})[..., :BASE_VOCAB_SIZE]
    assert (got - expected_logits(model, vision[0], config, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("name", LANGUAGE)
def test_bf16_is_as_exact_as_transformers_in_bf16(languages, vision, name: str) -> None:
    """Both measured against fp32: our rounding error may be at most 1.5 times transformers'."""
    model, folder = languages[name]
    stage = build_model(model_of(folder, vision[1]), attention=AttentionConfig(rule="causal"))
    load_pretrained(stage, vision=vision[1], language=folder)
    tokens = torch.randint(0, BASE_VOCAB_SIZE, (4, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact = model(tokens).logits[..., :BASE_VOCAB_SIZE]
        rounded = copy.deepcopy(model).bfloat16()(tokens).logits[..., :BASE_VOCAB_SIZE].float()
        got = stage.bfloat16().logits(tokens, text_ids(tokens))[..., :BASE_VOCAB_SIZE].float()
    assert 0 < (got - exact).norm() <= 1.5 * (rounded - exact).norm()


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_published_model_has_its_published_size(name: str, tmp_path: Path) -> None:
    """Names and shapes are those of transformers' model, which are those of the published files."""
    described, parameters = LANGUAGE[name]
    config = decoder_config(folder_with(tmp_path, described), vocab_size=32, num_added_tokens=0, lm_head_bias=False)
    with torch.device("meta"):
        external = AutoModelForCausalLM.from_config(hf_config(described))
    shapes = {key: tuple(tensor.shape) for key, tensor in external.named_parameters()}
    table = language_names(config)
    external_names = [name for names in table.values() for name in names]
    assert sorted(external_names) == sorted(shapes)
    native = model_shapes(ModelConfig(decoder=config))
    assert sum(math.prod(shapes[name]) for name in external_names) == parameters
    encoder = ("input_embedder.vision_encoder", "input_embedder.resampler")
    assert {name for name in native if not name.startswith(encoder)} == set(table)
    for key, names in table.items():
        rows = sum(shapes[name][0] for name in names)
        assert native[key] == (rows, *shapes[names[0]][1:]), key


def test_siglip_has_its_published_size(tmp_path: Path) -> None:
    described, parameters = VISION
    config = vision_config(folder_with(tmp_path, described))
    assert config == ModelConfig().vision
    shapes = model_shapes(ModelConfig())
    assert sum(math.prod(shapes[name]) for name in vision_names(config, "vision_model.")) == parameters


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_written_config_json_is_read_by_us_and_by_transformers(name: str, tmp_path: Path) -> None:
    counts = {"vocab_size": BASE_VOCAB_SIZE, "num_added_tokens": 2}
    config = decoder_config(folder_with(tmp_path, small(name)), **counts)
    again = language_config_json(config)
    assert decoder_config(folder_with(tmp_path / "again", again), **counts) == config
    model = transformer(again | {"pad_token_id": None})
    tokens = batch().tokens[1:]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, transformer(small(name))(tokens).logits)
    model.config.save_pretrained(tmp_path / "saved")  # as transformers 5 writes it
    assert decoder_config(tmp_path / "saved", **counts) == config


def test_a_rope_type_of_another_family_has_no_config_json() -> None:
    with pytest.raises(ConfigError, match="rope.rope_type=longrope with family=qwen3 has no name"):
        language_config_json(DecoderConfig(family="qwen3"))


def test_a_written_vision_config_json_is_read_back(tmp_path: Path) -> None:
    config = ModelConfig().vision.model_copy(update={"hidden_size": 64, "pooling_head": False})
    assert vision_config(folder_with(tmp_path, vision_config_json(config))) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_of_config_json_are_those_of_transformers(family: str) -> None:
    defaults = AutoConfig.for_model(family)
    for key, value in FAMILIES[family].config.defaults.items():
        assert getattr(defaults, key) == (defaults.num_attention_heads if value is None else value), key
    assert defaults.tie_word_embeddings is False
    assert defaults.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_round_trip_is_bit_identical(languages, name: str) -> None:
    folder = languages[name][1]
    config = decoder_config(folder, vocab_size=BASE_VOCAB_SIZE, num_added_tokens=2)
    source = language_source(folder, config)
    back = to_external(to_native(source.tensors, source.table), source.table, config)
    stored = load_file(folder / "model.safetensors")
    assert back.specs.keys() == stored.keys()
    for key, tensor in stored.items():
        assert torch.equal(back.get(key), tensor), key
        assert (back.specs[key].shape, back.specs[key].dtype) == (tuple(tensor.shape), tensor.dtype), key


def test_embeddings_without_room_are_extended_by_the_same_rows_every_time(languages) -> None:
    folder = languages["Qwen3-8B"][1]
    config = decoder_config(folder, vocab_size=65, num_added_tokens=2)
    assert config.padded_vocab_size == 128
    source = language_source(folder, config)
    assert source.extended == ("model.embed_tokens.weight", "lm_head.weight")
    stored = load_file(folder / "model.safetensors")
    for name in source.extended:
        table, again = source.tensors.get(name), language_source(folder, config).tensors.get(name)
        assert table.shape == source.tensors.specs[name].shape == (128, 64)
        assert torch.equal(table[:64], stored[name]) and torch.equal(table, again)
        assert float(table[64:].std()) == pytest.approx(0.02, rel=0.1)
    stage = build_model(tiny_whole(config), attention=AttentionConfig(rule="causal"))
    load_pretrained(stage, language=folder)
    assert torch.equal(stage.lm_head.base.weight, source.tensors.get("lm_head.weight"))
    with pytest.raises(
        ConfigError, match="padded_vocab_size=192, the folder has vocab_size, padded to hold all tokens=128"
    ):
        check_decoder_config(folder, config.model_copy(update={"padded_vocab_size": 192}))


def test_a_tied_embedding_that_is_stored_twice_must_be_equal(languages, tmp_path: Path) -> None:
    """The published folder of Qwen3-1.7B stores it twice."""
    folder = languages["Qwen3-1.7B"][1]
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    twice = stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    folder_with(tmp_path, json.loads((folder / "config.json").read_text()))
    save_file(twice, tmp_path / "model.safetensors")
    config = decoder_config(tmp_path, vocab_size=BASE_VOCAB_SIZE, num_added_tokens=2)
    assert language_source(tmp_path, config).skipped == ("lm_head.weight",)
    load_pretrained(build_model(tiny_whole(config), attention=AttentionConfig(rule="causal")), language=tmp_path)
    twice["lm_head.weight"][0, 0] += 1
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings=True, but lm_head.weight and .* differ"):
        language_source(tmp_path, config)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("Qwen3-8B", {"head_dim": 0}, "head_dim=0; it must be a whole number above 0"),
        ("Qwen3-8B", {"head_dim": 7}, "head_dim=7 .* must be even"),
        ("Llama-3.2-3B", {"head_dim": None, "hidden_size": 60}, "num_attention_heads=8 is no whole number"),
        ("Qwen3-8B", {"attention_bias": True}, "attention_bias=True; only attention_bias=False is supported"),
        ("Llama-3.2-3B", {"mlp_bias": True}, "mlp_bias=True"),
        ("Llama-3.2-3B", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("Phi-3.5-mini", {"sliding_window": 32}, "sliding_window=32 below max_position_embeddings=64"),
        (
            "Qwen2.5-3B",
            {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3},
            "sliding_window=32 below",
        ),
        ("Qwen3-8B", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 32}, "sliding_window=32 below"),
        (
            "Qwen2.5-3B",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type=yarn; supported for qwen2",
        ),
        ("Llama-3.2-3B", {"rope_scaling": {"rope_type": "llama3"}}, "no factor, which rope_type=llama3 needs"),
        ("Qwen3-8B", {"rope_scaling": {"type": "default", "factor": 2.0}}, "unknown factor=2.0 for rope_type=default"),
        (
            "Phi-3.5-mini",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor; only rotary embeddings over",
        ),
        ("Qwen3-8B", {"quantization_config": {"bits": 4}}, "quantization_config; give the folder"),
        ("Qwen3-8B", {"model_type": "siglip"}, "model_type=siglip; supported language models are phi3, llama"),
    ],
)
def test_an_unsupported_config_json_is_refused_by_its_key(
    name: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        decoder_config(folder_with(tmp_path, small(name, **changed)), vocab_size=BASE_VOCAB_SIZE, num_added_tokens=2)


def test_sliding_windows_without_effect_are_accepted(tmp_path: Path) -> None:
    inert = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4}
    folder = folder_with(tmp_path, small("Qwen2.5-3B", **inert))
    assert isinstance(decoder_config(folder, vocab_size=BASE_VOCAB_SIZE, num_added_tokens=2), DecoderConfig)


def test_a_language_model_folder_is_refused_as_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_type=qwen3; only model_type=siglip_vision_model is supported"):
        vision_config(folder_with(tmp_path, small("Qwen3-8B")))
