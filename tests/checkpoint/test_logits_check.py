"""The check that ends a conversion: equal weights pass on every backbone, and each kind of mistake is noticed."""

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
from aki_megatron.checkpoint.hf_config import describe_language, describe_vision
from aki_megatron.checkpoint.hf_reference import Reference
from aki_megatron.checkpoint.logits_check import LogitsReport, check_logits
from aki_megatron.checkpoint.readers import cast
from aki_megatron.checkpoint.tensors import TensorFact, TensorSource, View, to_native
from aki_megatron.checkpoint.weight_names import language_names, vision_names
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


def source_of(tensors: Mapping[str, Tensor]) -> View:
    facts = {name: TensorFact(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return View(facts, {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()})  # type: ignore[misc]


def roughened(model: PreTrainedModel) -> Tensors:
    """Tensors of a random model, moved so that no norm is one and no bias zero."""
    return {name: tensor + torch.randn_like(tensor) * 0.1 for name, tensor in model.state_dict().items()}


def stock(config: ModelConfig) -> Reference:
    """Two random stock models, as transformers names their tensors."""
    torch.manual_seed(0)
    language, vision = describe_language(config.decoder), describe_vision(config.vision)
    tensors = roughened(AutoModelForCausalLM.from_config(CONFIGS[config.decoder.family].from_dict(deepcopy(language))))
    tensors |= roughened(SiglipVisionModel(SiglipVisionConfig.from_dict(deepcopy(vision))))
    names = {**language_names(config.decoder), **vision_names(config.vision, "")}
    return Reference(source_of(tensors), names, language, vision)


def ours_of(config: ModelConfig, reference: Reference) -> Tensors:
    """All of our tensors: the reference's where it has them, new ones elsewhere."""
    new = build_model(config, rule="mma", seed=1)
    taken = to_native(reference.source, reference.names)
    return {name: tensor.detach() + 0.1 * torch.randn_like(tensor) for name, tensor in new.named_parameters()} | {
        name: taken.get(name) for name in taken.facts
    }


def check(family: str, change: Callable[[Tensors], None] | None = None) -> LogitsReport:
    config = model_config(DECODERS[family])
    reference = stock(config)
    ours = ours_of(config, reference)
    if change is not None:
        change(ours)
    return check_logits(source_of(ours), config, reference)


@pytest.mark.parametrize("family", DECODERS)
def test_the_same_weights_compute_the_same(family: str) -> None:
    report = check(family)
    assert report.passed, report.text()
    assert report.max_difference <= 1e-5 * report.scale
    assert report.causal_difference > 0.05 * report.scale
    assert not report.parted
    assert {name.rsplit(".", 1)[0] for name in report.not_compared if not name.startswith("front.resampler.")} <= {
        "front.embedding",
        "head.extra",
        "head.output",
    }
    assert "passed" in report.text() and "front.resampler (" in report.text()


def amplifying(gain: float) -> tuple[ModelConfig, Reference]:
    """A deep model whose weights make any difference grow from layer to layer."""
    decoder = DECODERS["phi3"].model_copy(update={"num_layers": 32, "rope": RopeConfig()})
    config = model_config(decoder)
    reference = stock(config)
    tensors = {name: torch.ones(fact.shape) for name, fact in reference.source.facts.items()}
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            tensor.normal_(std=1.0 if "embed" in name else gain * (tensor.numel() / len(tensor)) ** -0.5)
        elif name.endswith("bias"):
            tensor.zero_()
    return config, Reference(source_of(tensors), reference.names, reference.language, reference.vision)


def test_rounding_that_a_model_amplifies_is_told_from_a_mistake() -> None:
    config, reference = amplifying(6.0)
    ours = ours_of(config, reference)
    report = check_logits(source_of(ours), config, reference)
    assert report.limit > 2 * logits_check.TOLERANCE * report.scale
    assert report.passed and not report.parted, report.text()
    name = "blocks.20.attention.qkv.weight"
    ours[name] = ours[name] * 1.05
    report = check_logits(source_of(ours), config, reference)
    assert not report.passed and report.parted == "in decoder layer 20", report.text()


def swap_halves(name: str, rows: int) -> Callable[[Tensors], None]:
    """Exchange the first ``rows`` rows of a fused tensor with as many after them."""

    def change(ours: Tensors) -> None:
        whole = ours[name]
        ours[name] = torch.cat([whole[rows : 2 * rows], whole[:rows], whole[2 * rows :]])

    return change


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    def change(ours: Tensors) -> None:
        ours[one], ours[other] = ours[other], ours[one]

    return change


def replace(name: str, by: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def change(ours: Tensors) -> None:
        ours[name] = by(ours[name])

    return change


@pytest.mark.parametrize(
    ("family", "change", "parted"),
    [
        ("phi3", swap_halves("blocks.0.attention.qkv.weight", 64), "in decoder layer 0 or before it"),
        ("llama", swap_halves("blocks.1.feed_forward.gate_up.weight", 80), "in decoder layer 1"),
        ("qwen2", replace("blocks.1.attention.qkv.bias", torch.zeros_like), "in decoder layer 1"),
        (
            "qwen3",
            swap("blocks.1.attention.query_norm.weight", "blocks.1.attention.key_norm.weight"),
            "in decoder layer 1",
        ),
        ("qwen3", swap("blocks.0.attention_norm.weight", "blocks.0.feed_forward_norm.weight"), "layer 0 or before it"),
        ("llama", replace("front.vision.position_embedding", lambda table: table.roll(1, 0)), "layer 0 or before it"),
        ("qwen2", replace("front.embedding.table.weight", lambda table: table.roll(1, 0)), "layer 0 or before it"),
        ("phi3", replace("head.norm.weight", torch.ones_like), ""),
        ("phi3", replace("head.output.weight", lambda table: table.roll(1, 0)), ""),
        ("phi3", replace("blocks.2.feed_forward.down.weight", lambda weight: weight * float("nan")), ""),
    ],
)
def test_a_wrong_tensor_is_noticed_where_it_is(family: str, change: Callable[[Tensors], None], parted: str) -> None:
    report = check(family, change)
    assert not report.passed
    assert not report.max_difference <= 30 * report.limit
    assert parted in report.text() if parted else not report.parted
    assert "FAILED" in report.text()


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("phi3", {"rope_theta": 2000.0}),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}}),
        ("llama", {"rope_scaling": None}),
        ("qwen2", {"rms_norm_eps": 0.1}),
    ],
)
def test_another_configuration_on_the_other_side_is_noticed(family: str, said: dict[str, Any]) -> None:
    config = model_config(DECODERS[family])
    reference = stock(config)
    other = Reference(reference.source, reference.names, {**reference.language, **said}, reference.vision)
    assert not check_logits(source_of(ours_of(config, reference)), config, other).max_difference <= 1e-3


def aki(family: str = "phi3", **decoder: Any) -> tuple[ModelConfig, Tensors, Reference]:
    """A model with everything that AKI has, and the other side's copy of all of it under names of its own."""
    config = model_config(DECODERS[family].model_copy(update={"lm_head_bias": True} | decoder))
    side = stock(config)
    ours = ours_of(config, side)
    added = {name: (f"aki.{name}",) for name in ours if name not in side.names}
    copies = source_of({their: ours[name] for name, (their,) in added.items()})
    both = View({**side.source.facts, **copies.facts}, {**side.source.makers, **copies.makers})  # type: ignore[attr-defined]
    return config, ours, Reference(both, {**side.names, **added}, side.language, side.vision)


ADDED = ["front.resampler.latents", "front.resampler.blocks.1.attention.query.weight", "front.embedding.extra"]
ADDED += ["head.extra.weight", "head.extra.bias", "head.output.bias"]


@pytest.mark.parametrize("name", ["", *ADDED])
def test_what_aki_adds_is_compared_where_the_other_side_has_it(name: str) -> None:
    config, ours, reference = aki()
    if name:
        ours[name] = ours[name].flip(0)
    report = check_logits(source_of(ours), config, reference)
    assert report.not_compared == ()
    assert report.passed == (name == ""), report.text()


def test_tied_added_tokens() -> None:
    config, ours, reference = aki("llama", tie_word_embeddings=True)
    assert "head.extra.weight" not in ours
    assert check_logits(source_of(ours), config, reference).passed
    ours["front.embedding.extra"] = ours["front.embedding.extra"].flip(0)
    assert not check_logits(source_of(ours), config, reference).passed


def test_a_lost_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        logits_check, "build_stage", lambda config, layers, rule: build_stage(config, layers, rule="causal")
    )
    report = check("qwen2")
    assert not report.passed
    assert report.sees_the_mask
    assert report.max_difference == pytest.approx(report.causal_difference, rel=1e-3)


def test_a_check_that_cannot_see_the_mask_does_not_pass() -> None:
    """Without attention a causal mask is the same as any: equal logits prove nothing about it."""
    config, ours, reference = aki()
    for name in [name for name in ours if name.endswith("attention.out.weight") and name.startswith("blocks")]:
        ours[name] = torch.zeros_like(ours[name])
    blind = Reference(source_of(ours), {name: (name,) for name in ours}, reference.language, reference.vision)
    report = check_logits(source_of(ours), config, blind)
    assert report.max_difference <= report.limit
    assert not report.passed and "cannot see" in report.text()


def test_rows_that_the_other_side_lacks_are_ours() -> None:
    """Tables that were grown for added tokens."""
    config = model_config(DECODERS["llama"])
    reference = stock(config)
    ours = ours_of(config, reference)
    grown = config.model_copy(
        update={"decoder": config.decoder.model_copy(update={"padded_vocab_size": 128, "vocab_size": 65})}
    )
    table = ours["front.embedding.table.weight"]
    ours["front.embedding.table.weight"] = torch.cat([table, torch.randn(64, 64)])
    assert check_logits(source_of(ours), grown, reference).passed


def test_lower_precision_on_either_side_is_not_a_difference() -> None:
    config = model_config(DECODERS["qwen3"])
    reference = stock(config)
    rounded = cast(source_of(ours_of(config, reference)), torch.bfloat16)
    assert check_logits(rounded, config, reference).passed
    low = Reference(cast(reference.source, torch.bfloat16), reference.names, reference.language, reference.vision)
    assert check_logits(source_of(ours_of(config, reference)), config, low).passed


def test_one_layer_is_in_memory_at_a_time() -> None:
    config = model_config(DECODERS["phi3"])
    reference = stock(config)
    ours = ours_of(config, reference)
    given: list[tuple[str, weakref.ref[Tensor]]] = []

    def watched(source: TensorSource, layer: Callable[[str], str]) -> View:
        def get(name: str) -> Tensor:
            alive = {layer(other) for other, tensor in given if tensor() is not None} - {""}
            assert not layer(name) or alive <= {layer(name)}, f"{alive} are still held when {name} is read"
            tensor = source.get(name).clone()
            given.append((name, weakref.ref(tensor)))
            return tensor

        return View(source.facts, {name: partial(get, name) for name in source.facts})

    def part(name: str) -> str:
        found = re.search(r"^(blocks|model\.layers)\.(\d+)\.", name)
        return found.group(0) if found else ""

    other = Reference(watched(reference.source, part), reference.names, reference.language, reference.vision)
    assert check_logits(watched(source_of(ours), part), config, other).passed
    assert len({part(name) for name, _ in given}) == 2 * config.decoder.num_layers + 1
