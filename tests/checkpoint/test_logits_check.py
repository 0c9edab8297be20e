"""The final check of a conversion: equal weights pass on every backbone, and each kind of mistake is noticed."""

import re
import weakref
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from aki_megatron.checkpoint import logits_check
from aki_megatron.checkpoint.hf_config import language_config_json, vision_config_json
from aki_megatron.checkpoint.hf_reference import Reference
from aki_megatron.checkpoint.logits_check import LogitsComparison, check_logits
from aki_megatron.checkpoint.tensors import LazyTensors, TensorSource, TensorSpec, cast, to_native
from aki_megatron.checkpoint.weight_names import language_names, vision_names
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.model.stage import build_model, build_stage

Tensors = dict[str, Tensor]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 80,
    "lm_head_bias": False,
}
SIZES |= {"padded_vocab_size": 64, "vocab_size": 58, "num_added_tokens": 2}
CAUSAL = AttentionConfig(rule="causal")

LONGROPE = RopeConfig(
    rope_type="longrope",
    theta=1000.0,
    max_position_embeddings=64,
    original_max_position_embeddings=16,
    short_factor=(1.0, 1.1, 1.3, 1.7, 2.0, 2.2, 2.5, 2.9),
    long_factor=(1.1, 1.5, 3.0, 7.0, 12.0, 20.0, 30.0, 33.0),
)
LLAMA3 = RopeConfig(
    rope_type="llama3", theta=500.0, max_position_embeddings=256, original_max_position_embeddings=32, factor=8.0
)
DECODERS = {
    "phi3": DecoderConfig(family="phi3", rope=LONGROPE, **SIZES | {"num_kv_heads": 4}),
    "llama": DecoderConfig(family="llama", rope=LLAMA3, tie_word_embeddings=True, **SIZES),
    "qwen2": DecoderConfig(family="qwen2", rope=RopeConfig(theta=1e6), tie_word_embeddings=True, **SIZES),
    "qwen3": DecoderConfig(family="qwen3", rope=RopeConfig(theta=1e6), **SIZES | {"lm_head_bias": True}),
}
CONFIGS: dict[str, Any] = {"phi3": Phi3Config, "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def model_config(decoder: DecoderConfig) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            image_size=30, patch_size=7, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48
        ),
        resampler=ResamplerConfig(num_latents=5, num_layers=2, num_heads=2, head_dim=8),
        decoder=decoder,
    )


def source_of(tensors: Mapping[str, Tensor]) -> LazyTensors:
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return LazyTensors(specs, {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()})  # type: ignore[misc]


def randomized(model: PreTrainedModel) -> Tensors:
    """Tensors of a random model, changed so that no norm is one and no bias zero."""
    return {name: tensor + torch.randn_like(tensor) * 0.1 for name, tensor in model.state_dict().items()}


def stock_reference(config: ModelConfig) -> Reference:
    """Two random stock models, with the tensor names of transformers."""
    torch.manual_seed(0)
    language, vision = language_config_json(config.decoder), vision_config_json(config.vision)
    tensors = randomized(AutoModelForCausalLM.from_config(CONFIGS[config.decoder.family].from_dict(deepcopy(language))))
    tensors |= randomized(SiglipVisionModel(SiglipVisionConfig.from_dict(deepcopy(vision))))
    names = {**language_names(config.decoder), **vision_names(config.vision, "")}
    return Reference(source_of(tensors), names, language, vision)


def native_tensors(config: ModelConfig, reference: Reference) -> Tensors:
    """All native tensors: the reference's where it has them, random ones elsewhere."""
    new = build_model(config, attention=AttentionConfig(rule="mma"), seed=1)
    known = to_native(reference.source, reference.names)
    return {name: tensor.detach() + 0.1 * torch.randn_like(tensor) for name, tensor in new.named_parameters()} | {
        name: known.get(name) for name in known.specs
    }


def check(family: str, change: Callable[[Tensors], None] | None = None) -> LogitsComparison:
    config = model_config(DECODERS[family])
    reference = stock_reference(config)
    native = native_tensors(config, reference)
    if change is not None:
        change(native)
    return check_logits(source_of(native), config, reference)


@pytest.mark.parametrize("family", DECODERS)
def test_the_same_weights_compute_the_same(family: str) -> None:
    report = check(family)
    assert report.passed, report.text()
    assert report.max_difference <= 1e-5 * report.scale
    assert report.causal_difference > 0.05 * report.scale
    assert not report.diverged_at
    assert {
        name.rsplit(".", 1)[0] for name in report.not_compared if not name.startswith("input_embedder.resampler.")
    } <= {
        "input_embedder.token_embedding",
        "lm_head.added_tokens",
        "lm_head.base",
    }
    assert "passed" in report.text() and "input_embedder.resampler (" in report.text()


def amplifying(gain: float) -> tuple[ModelConfig, Reference]:
    """A deep model whose weights amplify any difference from layer to layer."""
    decoder = DECODERS["phi3"].model_copy(update={"num_layers": 32, "rope": RopeConfig()})
    config = model_config(decoder)
    reference = stock_reference(config)
    tensors = {name: torch.ones(spec.shape) for name, spec in reference.source.specs.items()}
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            tensor.normal_(std=1.0 if "embed" in name else gain * (tensor.numel() / len(tensor)) ** -0.5)
        elif name.endswith("bias"):
            tensor.zero_()
    return config, Reference(source_of(tensors), reference.names, reference.language, reference.vision)


def test_amplified_rounding_is_told_from_a_mistake() -> None:
    config, reference = amplifying(6.0)
    native = native_tensors(config, reference)
    report = check_logits(source_of(native), config, reference)
    assert report.limit > 2 * logits_check.TOLERANCE * report.scale
    assert report.passed and not report.diverged_at, report.text()
    name = "layers.20.attention.qkv_proj.weight"
    native[name] = native[name] * 1.05
    report = check_logits(source_of(native), config, reference)
    assert not report.passed and report.diverged_at == "in decoder layer 20", report.text()


def swap_rows(name: str, rows: int) -> Callable[[Tensors], None]:
    """Swap the first ``rows`` rows of a fused tensor with as many after them."""

    def change(native: Tensors) -> None:
        whole = native[name]
        native[name] = torch.cat([whole[rows : 2 * rows], whole[:rows], whole[2 * rows :]])

    return change


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    def change(native: Tensors) -> None:
        native[one], native[other] = native[other], native[one]

    return change


def replace(name: str, by: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def change(native: Tensors) -> None:
        native[name] = by(native[name])

    return change


@pytest.mark.parametrize(
    ("family", "change", "diverged_at"),
    [
        ("phi3", swap_rows("layers.0.attention.qkv_proj.weight", 64), "in decoder layer 0 or before it"),
        ("llama", swap_rows("layers.1.mlp.gate_up_proj.weight", 80), "in decoder layer 1"),
        ("qwen2", replace("layers.1.attention.qkv_proj.bias", torch.zeros_like), "in decoder layer 1"),
        (
            "qwen3",
            swap("layers.1.attention.q_norm.weight", "layers.1.attention.k_norm.weight"),
            "in decoder layer 1",
        ),
        ("qwen3", swap("layers.0.attention_norm.weight", "layers.0.mlp_norm.weight"), "layer 0 or before it"),
        (
            "llama",
            replace("input_embedder.vision_encoder.position_embedding", lambda table: table.roll(1, 0)),
            "layer 0 or before it",
        ),
        (
            "qwen2",
            replace("input_embedder.token_embedding.base.weight", lambda table: table.roll(1, 0)),
            "layer 0 or before it",
        ),
        ("phi3", replace("lm_head.norm.weight", torch.ones_like), ""),
        ("phi3", replace("lm_head.base.weight", lambda table: table.roll(1, 0)), ""),
        ("phi3", replace("layers.2.mlp.down_proj.weight", lambda weight: weight * float("nan")), ""),
    ],
)
def test_a_wrong_tensor_is_noticed_where_it_is(
    family: str, change: Callable[[Tensors], None], diverged_at: str
) -> None:
    report = check(family, change)
    assert not report.passed
    assert not report.max_difference <= 30 * report.limit
    assert diverged_at in report.text() if diverged_at else not report.diverged_at
    assert "FAILED" in report.text()


@pytest.mark.parametrize(
    ("family", "config_json"),
    [
        ("phi3", {"rope_theta": 2000.0}),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}}),
        ("llama", {"rope_scaling": None}),
        ("qwen2", {"rms_norm_eps": 0.1}),
    ],
)
def test_another_config_json_of_the_reference_is_noticed(family: str, config_json: dict[str, Any]) -> None:
    config = model_config(DECODERS[family])
    reference = stock_reference(config)
    other = Reference(reference.source, reference.names, {**reference.language, **config_json}, reference.vision)
    assert not check_logits(source_of(native_tensors(config, reference)), config, other).max_difference <= 1e-3


def aki(family: str = "phi3", **decoder: Any) -> tuple[ModelConfig, Tensors, Reference]:
    """A model with everything that AKI has, and a reference that holds all of it under other names."""
    config = model_config(DECODERS[family].model_copy(update={"lm_head_bias": True} | decoder))
    stock = stock_reference(config)
    native = native_tensors(config, stock)
    added = {name: (f"aki.{name}",) for name in native if name not in stock.names}
    copies = source_of({external: native[name] for name, (external,) in added.items()})
    both = LazyTensors({**stock.source.specs, **copies.specs}, {**stock.source.getters, **copies.getters})  # type: ignore[attr-defined]
    return config, native, Reference(both, {**stock.names, **added}, stock.language, stock.vision)


ADDED = [
    "input_embedder.resampler.latents",
    "input_embedder.resampler.layers.1.attention.q_proj.weight",
    "input_embedder.token_embedding.added_tokens",
]
ADDED += ["lm_head.added_tokens.weight", "lm_head.added_tokens.bias", "lm_head.base.bias"]


@pytest.mark.parametrize("name", ["", *ADDED])
def test_what_aki_adds_is_compared_where_the_reference_has_it(name: str) -> None:
    config, native, reference = aki()
    if name:
        native[name] = native[name].flip(0)
    report = check_logits(source_of(native), config, reference)
    assert report.not_compared == ()
    assert report.passed == (name == ""), report.text()


def test_tied_added_tokens() -> None:
    config, native, reference = aki("llama", tie_word_embeddings=True)
    assert "lm_head.added_tokens.weight" not in native
    assert check_logits(source_of(native), config, reference).passed
    native["input_embedder.token_embedding.added_tokens"] = native["input_embedder.token_embedding.added_tokens"].flip(
        0
    )
    assert not check_logits(source_of(native), config, reference).passed


def test_a_lost_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        logits_check, "build_stage", lambda config, layers, attention: build_stage(config, layers, attention=CAUSAL)
    )
    report = check("qwen2")
    assert not report.passed
    assert report.mask_matters
    assert report.max_difference == pytest.approx(report.causal_difference, rel=1e-3)


def test_a_check_that_cannot_tell_the_mask_does_not_pass() -> None:
    """Without attention every mask gives the same logits, so equal logits prove nothing about it."""
    config, native, reference = aki()
    for name in [name for name in native if name.endswith("attention.out_proj.weight") and name.startswith("layers")]:
        native[name] = torch.zeros_like(native[name])
    blind = Reference(source_of(native), {name: (name,) for name in native}, reference.language, reference.vision)
    report = check_logits(source_of(native), config, blind)
    assert report.max_difference <= report.limit
    assert not report.passed and "cannot tell" in report.text()


def test_rows_that_the_reference_lacks_are_native() -> None:
    """An embedding that was extended for added tokens."""
    config = model_config(DECODERS["llama"])
    reference = stock_reference(config)
    native = native_tensors(config, reference)
    extended = config.model_copy(
        update={"decoder": config.decoder.model_copy(update={"padded_vocab_size": 128, "vocab_size": 65})}
    )
    table = native["input_embedder.token_embedding.base.weight"]
    native["input_embedder.token_embedding.base.weight"] = torch.cat([table, torch.randn(64, 64)])
    assert check_logits(source_of(native), extended, reference).passed


def test_lower_precision_on_either_side_is_not_a_difference() -> None:
    config = model_config(DECODERS["qwen3"])
    reference = stock_reference(config)
    rounded = cast(source_of(native_tensors(config, reference)), torch.bfloat16)
    assert check_logits(rounded, config, reference).passed
    low = Reference(cast(reference.source, torch.bfloat16), reference.names, reference.language, reference.vision)
    assert check_logits(source_of(native_tensors(config, reference)), config, low).passed


def test_one_layer_is_in_memory_at_a_time() -> None:
    config = model_config(DECODERS["phi3"])
    reference = stock_reference(config)
    native = native_tensors(config, reference)
    read: list[tuple[str, weakref.ref[Tensor]]] = []

    def checked_source(source: TensorSource, layer: Callable[[str], str]) -> LazyTensors:
        def get(name: str) -> Tensor:
            alive = {layer(other) for other, tensor in read if tensor() is not None} - {""}
            assert not layer(name) or alive <= {layer(name)}, f"{alive} are still in memory when {name} is read"
            tensor = source.get(name).clone()
            read.append((name, weakref.ref(tensor)))
            return tensor

        return LazyTensors(source.specs, {name: partial(get, name) for name in source.specs})

    def layer_of(name: str) -> str:
        found = re.search(r"^(model\.)?layers\.\d+\.", name)
        return found.group(0) if found else ""

    other = Reference(checked_source(reference.source, layer_of), reference.names, reference.language, reference.vision)
    assert check_logits(checked_source(source_of(native), layer_of), config, other).passed
    assert len({layer_of(name) for name, _ in read}) == 2 * config.decoder.num_layers + 1
