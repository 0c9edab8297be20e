"""tools/convert.py with the official release, resharding, and inspect."""

import json
from pathlib import Path

import pytest
import torch
from convert_helpers import GOLDEN, Run, all_tensors, assert_equal, done, refused
from safetensors.torch import load_file, save_file
from tiny_folders import language_folder

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.save import dump_model
from aki_megatron.evaluate.golden_files import GoldenFolder

RELEASE = GOLDEN / "weights.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sizes of the golden release as a --model."""
    path = tmp_path_factory.mktemp("model") / "model.yaml"
    path.write_text(dump_model(GoldenFolder(GOLDEN).config, AttentionConfig(rule="mma")))
    return path


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The golden release as its training leaves it: a .pt without the encoder, and SigLIP's folder."""
    folder = tmp_path_factory.mktemp("training")
    release = load_file(RELEASE)
    rest = {f"module.{name}": tensor for name, tensor in release.items() if not name.startswith("vision_encoder.")}
    moments = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    content = {"epoch": 9, "step": None, "model_state_dict": rest, "optimizer_state_dict": moments}
    torch.save(content, folder / "checkpoint_9.pt")
    siglip = folder / "siglip"
    siglip.mkdir()
    start = "vision_encoder."
    encoder = {name.removeprefix(start): tensor for name, tensor in release.items() if name.startswith(start)}
    save_file(encoder, siglip / "model.safetensors")
    described = json.loads((GOLDEN / "config.json").read_text())["vision"]
    (siglip / "config.json").write_text(json.dumps(described | {"model_type": "siglip_vision_model"}))
    return folder / "checkpoint_9.pt", siglip


def test_the_release_round_trips_bit_for_bit(model: Path, convert: Run, tmp_path: Path) -> None:
    printed = done(convert("from-official", RELEASE, "--model", model, "--out", tmp_path / "aki"))
    assert "mapped           144" in printed and "MMA mask active: passed" in printed
    done(convert("to-official", tmp_path / "aki", "--out", tmp_path / "back"))
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), load_file(RELEASE))
    done(convert("from-official", tmp_path / "back", "--model", model, "--out", tmp_path / "again"))
    assert_equal(all_tensors(tmp_path / "again"), all_tensors(tmp_path / "aki"))


def test_training_checkpoints_and_the_encoder_are_the_release(
    model: Path, training: tuple[Path, Path], convert: Run, tmp_path: Path
) -> None:
    file, siglip = training
    command = ("from-official", file, "--model", model, "--out", tmp_path / "aki")
    error = refused(convert(*command), tmp_path / "aki")
    assert "holds no vision encoder" in error and "--vision" in error
    done(convert(*command, "--vision", siglip))
    done(convert("to-official", tmp_path / "aki", "--out", tmp_path / "whole"))
    release = load_file(RELEASE)
    assert_equal(load_file(tmp_path / "whole" / "model.safetensors"), release)
    done(convert("to-official", tmp_path / "aki", "--training", "--out", tmp_path / "part"))
    back = torch.load(tmp_path / "part" / "checkpoint_0.pt", weights_only=True)
    assert (back["epoch"], back["step"]) == (0, None)
    rest = {name: tensor for name, tensor in release.items() if not name.startswith("vision_encoder.")}
    assert_equal(back["model_state_dict"], rest)
    command = ("from-official", RELEASE, "--model", model, "--vision", siglip, "--out", tmp_path / "both")
    assert "holds the vision encoder; leave --vision out" in refused(convert(*command), tmp_path / "both")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_what_was_asked_for(dtype: torch.dtype, model: Path, convert: Run, tmp_path: Path) -> None:
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    done(convert("from-official", RELEASE, "--model", model, "--dtype", name, "--out", tmp_path / "aki"))
    assert {spec.dtype for spec in CheckpointSource(tmp_path / "aki").specs.values()} == {dtype}
    expected = {name: tensor.to(dtype).float() for name, tensor in load_file(RELEASE).items()}
    arguments = (tmp_path / "aki", "--dtype", "fp32", "--skip-logits-check", "--out", tmp_path / "out")
    message = refused(convert("to-hf", *arguments), tmp_path / "out")
    assert "No tokenizer for" in message and "--tokenizer FOLDER" in message
    done(convert("to-official", *arguments))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert_equal(written, expected)


def test_a_checkpoint_in_other_files(convert: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    tensors = {f"{kind}.t{number}": torch.randn(50, 3) for kind in kinds for number in range(4)}
    tensors["optimizer.step"] = torch.tensor(5.0)
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", keep_last=1, config_yaml="# a run\n")
    checkpointer.save(5, tensors, {"step": 5})
    before = checkpointer.folder / "step_000005"
    done(convert("reshard", tmp_path / "run", "--out", tmp_path / "four", "--files", 4))
    after = tmp_path / "four" / "step_000005"
    assert len(list(after.glob("*.distcp"))) == 4 > len(list(before.glob("*.distcp")))
    assert_equal(all_tensors(after), tensors)
    assert (after / "extra.json").read_bytes() == (before / "extra.json").read_bytes()
    assert (after / "config.yaml").read_text() == "# a run\n"
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert Checkpointer(tmp_path / "four", keep_last=1).load(after, into)["step"] == 5
    assert_equal(into, tensors)
    printed = done(convert("reshard", tmp_path / "run", "--out", tmp_path / "weights", "--weights-only"))
    assert_equal(all_tensors(tmp_path / "weights"), {n: t for n, t in tensors.items() if n.startswith("weight.")})
    assert "skipped            9  only in the source" in printed and "and 5 more" in printed


def test_inspect_recognizes_every_format_and_counts_parameters(siglip: Path, convert: Run, tmp_path: Path) -> None:
    lm = language_folder(tmp_path / "lm", "Phi-3.5-mini")
    native, flags = tmp_path / "native", ("--skip-logits-check", "--out")
    done(convert("from-hf", "--lm", lm, "--vision", siglip, *flags, native))
    done(convert("to-hf", native, *flags, tmp_path / "export"))
    done(convert("to-official", native, *flags, tmp_path / "official"))
    done(convert("to-official", native, "--training", *flags, tmp_path / "training"))
    vision, resampler = {"vision encoder": 27_792}, {"resampler": 449_248}
    added = 2 * 32 + 64 + 2 * 32 + 2  # added embeddings, LM head bias, added rows of the LM head and their biases
    stock, decoder = {"decoder": 21_664}, {"decoder": 21_664 + added}
    expected = {
        native: ("checkpoint of aki_megatron", vision | resampler | decoder),
        tmp_path / "official": ("official AKI release", vision | resampler | decoder),
        tmp_path / "training" / "checkpoint_0.pt": ("official AKI release", resampler | decoder),
        tmp_path / "export": ("AKI for transformers", vision | resampler | decoder),
        lm: ("language model", stock),
        siglip: ("SigLIP", vision),
    }
    for path, (format_name, counts) in expected.items():
        lines = done(convert("inspect", path)).splitlines()
        assert format_name in lines[0] and f"{sum(counts.values()):,} parameters" in lines[0]
        found = [line for line in lines if line.startswith("  ")]
        assert {line[2:18].strip(): int(line.split()[-5].replace(",", "")) for line in found} == counts
        assert len(done(convert("inspect", path, "--all")).splitlines()) > len(lines)
    lines = [line.split() for line in done(convert("inspect", lm)).splitlines()]
    assert ["model.layers.{i}.mlp.down_proj.weight", "2", "x", "32x48", "float32", "0.012", "MB"] in lines
