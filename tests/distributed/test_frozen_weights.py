"""Frozen weights stay bit for bit those of the folder they came from: in checkpoints, exports, and after resuming."""

from pathlib import Path

import pytest
import torch
from test_resume import Layout
from tiny import MODEL, Setting, take_steps, tiny_engine
from torch import Tensor

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.checkpoint.hf_export import export
from aki_megatron.checkpoint.hf_folders import save_vision
from aki_megatron.checkpoint.initial_weights import load_pretrained
from aki_megatron.checkpoint.readers import open_safetensors
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.model.vision import VisionEncoder

pytestmark = pytest.mark.distributed
LAYOUTS = {
    "DP2, ZeRO-1": Layout(2, zero_stage=1),
    "DP4, ZeRO-2": Layout(4, zero_stage=2),
    "TP2 x DP2, ZeRO-3": Layout(4, tensor=2),
    "PP2 x 2 virtual stages x DP2, ZeRO-2": Layout(4, pipeline=2, virtual_stages=2, zero_stage=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An encoder whose weights have more digits than bf16 keeps."""
    path = tmp_path_factory.mktemp("vision") / "encoder"
    torch.manual_seed(0)
    save_vision(VisionEncoder(MODEL.vision), MODEL.vision, path)
    with_digits = [tensor for tensor in tensors_of(path).values() if not torch.equal(tensor, tensor.bfloat16().float())]
    assert len(with_digits) > 10
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    source = open_safetensors(path)
    return {name: source.get(name) for name in source.specs}


def train_and_save(topology, setting: Setting, vision: Path, checkpoints: Path, step: int) -> dict[str, Tensor]:
    """Take one step from the folder, or from the newest checkpoint; save. Return what a run would export."""
    checkpointer = Checkpointer(checkpoints, keep_last=1)
    checkpoint = checkpointer.latest()
    engine = tiny_engine(
        topology,
        setting,
        init_weights=lambda stage: load_pretrained(
            stage,
            vision=None if checkpoint else vision,
            tensor_rank=topology.tensor_rank,
            tensor_ranks=topology.tensor,
        ),
    )
    if checkpoint:
        tensors = engine.state_dict()
        checkpointer.load(checkpoint, tensors)
        engine.load_state_dict(tensors)
    take_steps(engine, topology, [step])
    checkpointer.save(step, engine.state_dict(), {"step": step})
    return {name: weight.cpu() for name, weight in engine.named_weights() if "vision_encoder" in name}


def wrong_tensors(vision: Path, checkpoints: Path, out: Path) -> list[str]:
    """Export the newest checkpoint; return its frozen tensors that differ from the folder's."""
    export(CheckpointSource(checkpoints), MODEL, AttentionConfig(rule="mma"), None, out)
    exported = tensors_of(out)
    found = {
        name.removeprefix("vision_model."): (tensor, exported[name.replace("vision_model.", "model.vision_tower.")])
        for name, tensor in tensors_of(vision).items()
    }
    return [
        name for name, (before, after) in found.items() if before.dtype != after.dtype or not torch.equal(before, after)
    ]


@pytest.mark.parametrize("first", LAYOUTS)
def test_frozen_weights_survive_bf16_runs_bit_for_bit(pool, tmp_path, folder, first):
    """Every layout saves, and every later one resumes from what the one before saved."""
    start = list(LAYOUTS).index(first)
    for step, name in enumerate([*LAYOUTS, *LAYOUTS][start : start + 2], start=1):
        layout = LAYOUTS[name]
        sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline}
        setting = layout.setting(precision="bf16")
        results = pool.run(layout.ranks, train_and_save, setting, folder, tmp_path / "run", step, **sizes)
        assert wrong_tensors(folder, tmp_path / "run", tmp_path / f"export {step}") == []
        source = CheckpointSource(tmp_path / "run")
        for weights in results:
            assert all(torch.equal(weight, source.get(weight_name)) for weight_name, weight in weights.items())
        assert results[0], "the first stage holds the encoder"
