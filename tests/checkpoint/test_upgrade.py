"""Checkpoints of format 1 are refused with the command that converts them, and convert bit for bit."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from convert_helpers import Run, all_tensors, assert_equal, done, refused
from torch import Tensor

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.checkpoint.initial_weights import load_weights
from aki_megatron.checkpoint.listing import verify_files
from aki_megatron.checkpoint.shapes import model_shapes
from aki_megatron.checkpoint.upgrade import upgraded_name
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.config.run import WatchConfig
from aki_megatron.config.save import load_model
from aki_megatron.data.batch_planner import STATE_VERSION
from aki_megatron.errors import CheckpointError, ConfigError
from aki_megatron.model.stage import build_model
from aki_megatron.supervise.loss_spikes import LossSpikeGuard

MODEL = ModelConfig(
    vision=VisionConfig(image_size=8, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12),
    resampler=ResamplerConfig(num_latents=2, num_layers=1, num_heads=2, head_dim=4, mlp_ratio=2),
    decoder=DecoderConfig(
        family="qwen3",
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=12,
        padded_vocab_size=38,
        vocab_size=35,
        num_added_tokens=3,
        lm_head_bias=True,
        tie_word_embeddings=False,
        rope=RopeConfig(),
    ),
)
OLD_CONFIG = """\
run: {dir: runs/old}
model:
  vision: {image_size: 8, patch_size: 4, width: 8, layers: 1, heads: 2, mlp_width: 12, pooling_head: true}
  resampler: {latents: 2, layers: 1, heads: 2, head_width: 4, mlp_ratio: 2, norm_eps: 1.0e-05}
  decoder:
    family: qwen3
    width: 16
    layers: 2
    heads: 4
    kv_heads: 2
    mlp_width: 12
    vocab_rows: 38
    base_tokens: 35
    extra_tokens: 3
    head_bias: true
    tie_embeddings: false
    rope: {kind: default, max_positions: 4096}
attention: {rule: mma}
data:
  sources:
  - {name: vsr, weight: 1.0, dialogues: whole}
  mixing: length
train: {steps: 9, global_batch: 8, micro_batch: 4}
"""
OLD_EXTRA = {
    "step": 7,
    "data_step": 9,
    "data": {"version": 1, "phase": 0, "block": 2, "row": 5},
    "judge": {"losses": [0.1, 1 / 3], "norms": [2.0, 0.5], "spikes_in_a_row": 1},
}
OLD_LAYER_NAMES = {
    "attention_norm": "attention_norm",
    "attention.qkv": "attention.qkv_proj",
    "attention.query_norm": "attention.q_norm",
    "attention.key_norm": "attention.k_norm",
    "attention.out": "attention.out_proj",
    "feed_forward_norm": "mlp_norm",
    "feed_forward.gate_up": "mlp.gate_up_proj",
    "feed_forward.down": "mlp.down_proj",
}
OLD_VISION_LAYER_NAMES = {
    "attention_norm": "attention_norm",
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.out": "attention.out_proj",
    "feed_forward_norm": "mlp_norm",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
OLD_NAMES = {
    **{f"blocks.{i}.{old}": f"layers.{i}.{new}" for i in range(2) for old, new in OLD_LAYER_NAMES.items()},
    **{
        f"front.vision.blocks.0.{old}": f"input_embedder.vision_encoder.layers.0.{new}"
        for old, new in OLD_VISION_LAYER_NAMES.items()
    },
    "front.vision.patch_embedding": "input_embedder.vision_encoder.patch_embedding",
    "front.vision.position_embedding": "input_embedder.vision_encoder.position_embedding",
    "front.vision.norm": "input_embedder.vision_encoder.norm",
    "front.vision.pooling.probe": "input_embedder.vision_encoder.pooling_head.probe",
    **{
        f"front.vision.pooling.attention.{name}": f"input_embedder.vision_encoder.pooling_head.attention.{name}"
        for name in ("in_proj_weight", "in_proj_bias", "out_proj")
    },
    "front.vision.pooling.norm": "input_embedder.vision_encoder.pooling_head.norm",
    "front.vision.pooling.feed_forward.up": "input_embedder.vision_encoder.pooling_head.mlp.up_proj",
    "front.vision.pooling.feed_forward.down": "input_embedder.vision_encoder.pooling_head.mlp.down_proj",
    "front.resampler.latents": "input_embedder.resampler.latents",
    "front.resampler.blocks.0.attention.norm_media": "input_embedder.resampler.layers.0.attention.norm_media",
    "front.resampler.blocks.0.attention.norm_latents": "input_embedder.resampler.layers.0.attention.norm_latents",
    "front.resampler.blocks.0.attention.query": "input_embedder.resampler.layers.0.attention.q_proj",
    "front.resampler.blocks.0.attention.key_value": "input_embedder.resampler.layers.0.attention.kv_proj",
    "front.resampler.blocks.0.attention.out": "input_embedder.resampler.layers.0.attention.out_proj",
    "front.resampler.blocks.0.feed_forward.norm": "input_embedder.resampler.layers.0.mlp.norm",
    "front.resampler.blocks.0.feed_forward.up": "input_embedder.resampler.layers.0.mlp.up_proj",
    "front.resampler.blocks.0.feed_forward.down": "input_embedder.resampler.layers.0.mlp.down_proj",
    "front.resampler.norm": "input_embedder.resampler.norm",
    "front.resampler.projection": "input_embedder.resampler.projection",
    "front.embedding.table": "input_embedder.token_embedding.base",
    "front.embedding.extra": "input_embedder.token_embedding.added_tokens",
    "head.norm": "lm_head.norm",
    "head.output": "lm_head.base",
    "head.extra": "lm_head.added_tokens",
}
"""Module or parameter names of format 1, written out -> the current ones."""


def old_name(name: str) -> str:
    """The name in format 1 of a parameter."""
    module, _, kind = name.rpartition(".")
    inverse = {new: old for old, new in OLD_NAMES.items()}
    return inverse[name] if name in inverse else f"{inverse[module]}.{kind}"


def state() -> dict[str, Tensor]:
    """Random weights and optimizer state of the model under their current names, the same at every call."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{kind}.{name}": torch.randn(shape, generator=generator)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, shape in model_shapes(MODEL).items()
    }
    return tensors | {"optimizer.step": torch.tensor(7.0)}


def rewrite(checkpoint: Path, name: str, content: str) -> None:
    """Replace a file of a checkpoint and its manifest entry."""
    (checkpoint / name).write_text(content)
    manifest = json.loads((checkpoint / files.MANIFEST).read_text())
    manifest["files"][name] = files.file_digest(checkpoint / name)
    (checkpoint / files.MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A run folder of format 1, with a checkpoint of step 7."""
    run = tmp_path / "old"
    checkpointer = Checkpointer(run / "checkpoints", keep_last=1, config_yaml=OLD_CONFIG)
    old_state = {}
    for name, tensor in state().items():
        kind, _, parameter = name.partition(".")
        old_state[name if kind == "optimizer" else f"{kind}.{old_name(parameter)}"] = tensor
    torch.manual_seed(11)
    checkpointer.save(7, old_state, OLD_EXTRA)
    checkpoint = run / "checkpoints" / "step_000007"
    content = json.loads((checkpoint / files.EXTRA).read_text())
    rewrite(checkpoint, files.EXTRA, json.dumps({"extra": content["extra"], "random": content["rng_states"]}))
    manifest = json.loads((checkpoint / files.MANIFEST).read_text())
    del manifest["format"]
    (checkpoint / files.MANIFEST).write_text(json.dumps(manifest))
    (run / files.CONFIG).write_text(OLD_CONFIG)
    return run


def test_a_checkpoint_of_format_1_is_refused_with_the_command(old_run: Path, convert: Run, tmp_path: Path) -> None:
    command = "checkpoint format 1.*convert it once with python tools/convert.py upgrade .*step_000007 --out NEW_FOLDER"
    checkpointer = Checkpointer(old_run / "checkpoints", keep_last=1)
    with pytest.raises(CheckpointError, match=command):
        checkpointer.load(checkpointer.latest(), state())
    with pytest.raises(CheckpointError, match=command):
        load_weights(build_model(MODEL, attention=AttentionConfig(rule="mma")), old_run)
    with pytest.raises(ConfigError, match="python tools/convert.py upgrade .*"):
        load_model(old_run / files.CONFIG)
    for name in ("to-hf", "to-official", "reshard"):
        assert "tools/convert.py upgrade" in refused(
            convert(name, old_run, "--out", tmp_path / "out"), tmp_path / "out"
        )
    lines: list[str] = []
    assert verify_files(old_run, lines.append), "its files can still be verified"


def test_an_upgraded_checkpoint_is_equal_bit_for_bit(old_run: Path, convert: Run, tmp_path: Path) -> None:
    expected = state()
    old = old_run / "checkpoints" / "step_000007"
    printed = done(convert("upgrade", old, "--out", tmp_path / "new", "--files", 3))
    assert f"mapped           {len(expected)}" in printed
    new = tmp_path / "new" / "step_000007"
    assert len(list(new.glob("*.distcp"))) == 3
    assert_equal(all_tensors(new), expected)
    checkpointer = Checkpointer(tmp_path / "new", keep_last=1)
    into = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    torch.manual_seed(11)
    random = torch.rand(3)
    extra = checkpointer.load(checkpointer.latest(), into)
    assert torch.equal(torch.rand(3), random), "the random generators are restored, too"
    assert_equal(into, expected)
    assert extra == {
        "step": 7,
        "data_step": 9,
        "data": {"version": STATE_VERSION, "phase": 0, "block": 2, "sequence": 5},
        "loss_spike_guard": {"losses": [0.1, 1 / 3], "grad_norms": [2.0, 0.5], "consecutive_spikes": 1},
    }
    assert LossSpikeGuard(WatchConfig(), extra["loss_spike_guard"]).state_dict() == extra["loss_spike_guard"]
    config, attention = load_model(new / files.CONFIG)
    assert attention == AttentionConfig(rule="mma")
    assert config.vision == MODEL.vision and config.decoder.num_kv_heads == 2
    model = build_model(config, attention=attention, seed=99)
    load_weights(model, tmp_path / "new")
    assert_equal(
        {f"weight.{n}": t.detach() for n, t in model.named_parameters()},
        {n: t for n, t in expected.items() if n.startswith("weight.")},
    )


def test_a_run_folder_becomes_one_that_resumes(old_run: Path, convert: Run, tmp_path: Path) -> None:
    out = tmp_path / "new"
    printed = done(convert("upgrade", old_run, "--out", out))
    assert f"start the run again with --config {out / 'config.yaml'}" in printed
    assert CheckpointSource(out).path == out / "checkpoints" / "step_000007"
    values = yaml.safe_load((out / files.CONFIG).read_text())
    assert values["run"] == {"dir": str(out)}
    assert values["data"] == {
        "sources": [{"name": "vsr", "weight": 1.0, "split_turns": False}],
        "mixing": "proportional",
    }
    assert values["train"] == {"steps": 9, "global_batch_size": 8, "micro_batch_size": 4}
    checkpoint_values = yaml.safe_load((out / "checkpoints" / "step_000007" / files.CONFIG).read_text())
    assert checkpoint_values == values | {"run": {"dir": "runs/old"}}


def test_what_cannot_be_upgraded(old_run: Path, convert: Run, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", old_run / "checkpoints" / "step_000007"
    done(convert("upgrade", old_run, "--out", tmp_path / "new"))
    assert "the current one: it needs no upgrade" in refused(convert("upgrade", tmp_path / "new", "--out", out), out)
    rewrite(checkpoint, files.CONFIG, OLD_CONFIG.replace("extra_tokens: 3", "extra_tokens: 2"))
    error = refused(convert("upgrade", old_run, "--out", out), out)
    assert "shape mismatch: input_embedder.token_embedding.added_tokens is (3, 16), the model needs (2, 16)" in error
    (checkpoint / files.CONFIG).write_text("model: {}\n")
    assert "config.yaml has" in refused(convert("upgrade", old_run, "--out", out), out)


def test_only_parameter_names_are_changed() -> None:
    assert upgraded_name("optimizer.step") == "optimizer.step"
    assert upgraded_name("exp_avg.blocks.11.attention.qkv.bias") == "exp_avg.layers.11.attention.qkv_proj.bias"
    assert upgraded_name("weight.head.extra.bias") == "weight.lm_head.added_tokens.bias"
