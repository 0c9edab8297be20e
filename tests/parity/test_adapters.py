"""Low-rank adapters leave training unchanged: merged at export, and as an adapter that the peft library loads."""

from pathlib import Path

import pytest
import torch
import yaml
from exported_aki import batch, config, inputs, load, prompts
from peft import PeftModel

from aki_megatron.checkpoint.adapters import merge_adapters, without_adapters, write_adapter
from aki_megatron.checkpoint.dcp_io import CheckpointSource, stored_weights, write_checkpoint
from aki_megatron.checkpoint.hf_export import export
from aki_megatron.checkpoint.initial_weights import load_weights
from aki_megatron.checkpoint.tensors import LazyTensors, TensorSpec
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.trainable import LoraConfig, PartPlan, TrainingPlan
from aki_megatron.errors import CheckpointError
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import stack_ids

MMA = AttentionConfig(rule="mma")
FUSED, SEPARATE = ("qkv_proj", "down_proj", "gate_up_proj"), ("q_proj", "v_proj", "o_proj", "up_proj")
CASES = [(family, targets) for family in ("phi3", "llama", "qwen2") for targets in ((), FUSED, SEPARATE)]


def trained_model(family: str, targets: tuple[str, ...]) -> tuple[Stage, LoraConfig]:
    """Random weights, adapters too."""
    lora = LoraConfig(rank=3, alpha=5.0, targets=targets)
    stage = build_model(config(family), attention=MMA, plan=TrainingPlan({"decoder": PartPlan("lora")}, lora))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return stage.eval(), lora


def checkpoint_of(stage: Stage, lora: LoraConfig, folder: Path) -> CheckpointSource:
    values = {
        "model": stage.config.model_dump(mode="json"),
        "attention": stage.attention.model_dump(mode="json"),
        "trainable": {"decoder": "lora", "lora": lora.model_dump(mode="json")},
    }
    parameters = dict(stage.named_parameters())
    source = LazyTensors(
        {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in parameters.items()},
        {name: lambda name=name: parameters[name].detach() for name in parameters},
    )
    write_checkpoint(folder, 0, stored_weights(source), config_yaml=yaml.safe_dump(values))
    return CheckpointSource(folder)


def logits_of(stage: Stage) -> torch.Tensor:
    texts, images = prompts()
    samples = batch(texts, torch.cat(images))
    with torch.no_grad():
        logits = stage.logits(samples.token_ids, stack_ids(samples), samples.media)
    return logits[..., : stage.config.decoder.total_vocab_size]  # the others are -inf


def external_logits(model: torch.nn.Module, length: int) -> torch.Tensor:
    texts, images = prompts()
    with torch.no_grad():
        return model(**inputs(texts, torch.cat(images), side="right")).logits[:, :length]


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Over the positions that are not padding."""
    texts, _ = prompts()
    vocabulary = min(one.shape[-1], other.shape[-1])
    return max(
        float((one[row, : len(ids), :vocabulary] - other[row, : len(ids), :vocabulary]).abs().max())
        for row, (ids, _) in enumerate(texts)
    )


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_export_and_peft_compute_the_trained_model(tmp_path, family, targets):
    stage, lora = trained_model(family, targets)
    source = checkpoint_of(stage, lora, tmp_path / "checkpoint")
    expected = logits_of(stage)
    export(merge_adapters(source, stage.config), stage.config, MMA, None, tmp_path / "merged")
    export(without_adapters(source), stage.config, MMA, None, tmp_path / "base")
    write_adapter(source, stage.config, tmp_path / "base" / "adapter", None)
    length = expected.shape[1]
    merged, base = (external_logits(load(tmp_path / name), length) for name in ("merged", "base"))
    adapted = external_logits(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "base/adapter"), length)
    scale = float(expected.abs().max())
    assert largest_difference(merged, expected) <= 1e-4 * scale
    assert largest_difference(adapted, expected) <= 1e-4 * scale
    assert largest_difference(base, expected) > 1e-2 * scale, "the adapters matter"
    plain = build_model(stage.config, attention=MMA, seed=5)
    load_weights(plain, tmp_path / "checkpoint")  # what --init.weights and the evaluation do
    assert largest_difference(logits_of(plain), expected) <= 1e-4 * scale


def test_a_checkpoint_without_adapters_has_none_to_write(tmp_path):
    stage, lora = trained_model("phi3", ())
    plain = build_model(stage.config, attention=MMA)
    source = checkpoint_of(plain, lora, tmp_path / "checkpoint")
    assert merge_adapters(source, stage.config) is source
    with pytest.raises(CheckpointError, match="has no low-rank adapters.*without --adapter"):
        write_adapter(source, stage.config, tmp_path / "adapter", None)


def test_new_adapters_are_as_in_peft_and_add_nothing():
    lora = LoraConfig(rank=4)
    plan = TrainingPlan({"decoder": PartPlan("lora")}, lora)
    with_adapters, plain = (build_model(config("phi3"), attention=MMA, seed=3, plan=p) for p in (plan, _without(plan)))
    weights = dict(with_adapters.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.named_parameters())
    assert torch.equal(logits_of(with_adapters), logits_of(plain))
    for name, tensor in weights.items():
        if ".lora_A." in name:  # uniform between +- 1 / sqrt(in_features)
            bound = tensor.shape[1] ** -0.5
            assert 0.8 * bound < float(tensor.abs().max()) <= bound
        elif ".lora_B." in name:
            assert not tensor.any()


def _without(plan: TrainingPlan) -> TrainingPlan:
    return TrainingPlan(plan.parts, None)
