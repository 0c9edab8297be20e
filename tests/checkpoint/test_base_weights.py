"""A checkpoint that leaves frozen weights out is opened like a whole one; its base is found, compared, or named."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from chat_folders import PHI3_LIKE
from convert_helpers import Run, all_tensors, assert_equal, done, refused
from torch import Tensor, nn

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.base_weights import NO_BASE_PATHS, BasePaths, open_source, read_base_paths
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.conversion_steps import open_checkpoint
from aki_megatron.checkpoint.dcp_io import WEIGHT
from aki_megatron.checkpoint.frozen_record import (
    FILE,
    FrozenBase,
    FrozenRecord,
    FrozenTensor,
    read_record,
    tensor_sha256,
)
from aki_megatron.checkpoint.hf_folders import save_vision
from aki_megatron.checkpoint.initial_weights import load_weights
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.config.trainable import LoraConfig, PartPlan, TrainingPlan
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import CheckpointError, ConfigError
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.stage import build_model
from aki_megatron.model.trainable import is_trained

VOCAB_SIZE = Tokenizer(PHI3_LIKE, FAMILIES["phi3"].chat).image_id
MODEL = ModelConfig(
    vision=VisionConfig(image_size=8, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12),
    resampler=ResamplerConfig(num_latents=2, num_layers=1, num_heads=2, head_dim=4, mlp_ratio=2),
    decoder=DecoderConfig(
        hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=12, padded_vocab_size=640,
        vocab_size=VOCAB_SIZE, num_added_tokens=2, lm_head_bias=True, rope=RopeConfig(),
    ),
)  # fmt: skip
MMA = AttentionConfig(rule="mma")
LORA = LoraConfig(rank=3, alpha=5.0)
PLAN = TrainingPlan({"resampler": PartPlan("full"), "decoder": PartPlan("lora")}, LORA)


def config_yaml() -> str:
    values = {"model": MODEL.model_dump(mode="json"), "attention": MMA.model_dump(mode="json")}
    return yaml.safe_dump(values | {"trainable": {"decoder": "lora", "lora": LORA.model_dump(mode="json")}})


def save(
    folder: Path, weights: Mapping[str, Tensor], *, step: int = 2, record: FrozenRecord | None = None, keep: int = 3
) -> Path:
    """Write a checkpoint as a run does; return its run folder."""
    tokenizer = {path.name: path.read_bytes() for path in PHI3_LIKE.iterdir() if path.suffix == ".json"}
    checkpointer = Checkpointer(
        folder / files.CHECKPOINTS, keep_last=keep, config_yaml=config_yaml(), tokenizer_files=tokenizer
    )
    state = {WEIGHT + name: tensor for name, tensor in weights.items()} | {"optimizer.step": torch.tensor(2.0)}
    checkpointer.save(step, state, {"step": step}, rank_files={FILE: record.to_json()} if record else {})
    return folder


def random_weights(seed: int, plan: TrainingPlan | None = None) -> dict[str, Tensor]:
    stage = build_model(MODEL, attention=MMA, plan=plan or TrainingPlan({}, None))
    torch.manual_seed(seed)
    return {name: torch.randn_like(parameter) * 0.2 for name, parameter in stage.named_parameters()}


def record_of(weights: Mapping[str, Tensor], base: Path, key: str = "init.weights") -> FrozenRecord:
    """Name ``weights`` as taken from ``base``: a run folder for init.weights."""
    tensors = {name: FrozenTensor(tuple(tensor.shape), tensor_sha256(tensor)) for name, tensor in weights.items()}
    if key != "init.weights":
        return FrozenRecord({key: FrozenBase(str(base), str(base.absolute()), tensors)})
    taken = files.find_checkpoint(base)
    manifest = files.file_digest(taken / files.MANIFEST)["sha256"]
    return FrozenRecord({key: FrozenBase(str(base), str(base.absolute()), tensors, taken.name, manifest)})


@dataclass(frozen=True)
class Runs:
    """The run that gave the weights, and two runs that trained adapters on them to the same end."""

    base: Path
    part: Path
    whole: Path


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    first, last = random_weights(1), random_weights(2, PLAN)
    frozen = {name: first[name] for name in last if not is_trained(name, PLAN)}
    trained = {name: tensor for name, tensor in last.items() if name not in frozen}
    assert len(frozen) > 20 and any(".lora_A." in name for name in trained)
    base = save(tmp_path / "base", first, step=7)
    return Runs(
        base,
        save(tmp_path / "part", trained, record=record_of(frozen, base)),
        save(tmp_path / "whole", trained | frozen),
    )


def tensors_of(run: Path, *, merged: bool, base_paths: BasePaths = NO_BASE_PATHS) -> dict[str, Tensor]:
    source, _ = open_checkpoint(run, merged=merged, base_paths=base_paths)
    return {name: source.get(name) for name in source.specs}


@pytest.mark.parametrize("merged", [True, False])
def test_weights_are_those_of_a_whole_checkpoint(runs: Runs, merged: bool) -> None:
    assert_equal(tensors_of(runs.part, merged=merged), tensors_of(runs.whole, merged=merged))
    sizes = [sum(file.stat().st_size for file in run.rglob("*.distcp")) for run in (runs.part, runs.whole)]
    assert sizes[0] < 0.5 * sizes[1]


def test_a_model_starts_from_it(runs: Runs) -> None:
    models = [build_model(MODEL, attention=MMA, seed=seed) for seed in (3, 4)]
    for model, run in zip(models, (runs.part, runs.whole), strict=True):
        load_weights(model, run)
    one, other = (dict(model.named_parameters()) for model in models)
    assert_equal(one, other)


def test_conversions_equal_those_of_a_whole_checkpoint(runs: Runs, convert: Run, tmp_path: Path) -> None:
    written: dict[str, dict[str, bytes]] = {}
    for run in (runs.part, runs.whole):
        out = tmp_path / f"out of {run.name}"
        done(convert("to-hf", run, "--adapter", "--skip-logits-check", "--out", out / "hf"))
        done(convert("to-official", run, "--skip-logits-check", "--out", out / "official"))
        weights = sorted(out.rglob("*.safetensors"))
        written[run.name] = {path.relative_to(out).as_posix(): path.read_bytes() for path in weights}
    assert len(written["part"]) == 3 and written["part"] == written["whole"]
    done(convert("reshard", runs.part, "--out", tmp_path / "copy"))
    assert_equal(all_tensors(tmp_path / "copy"), all_tensors(runs.whole))
    assert read_record(files.find_checkpoint(tmp_path / "copy")) is None, "a copy is whole"
    shutil.rmtree(runs.base)
    assert_equal(tensors_of(tmp_path / "copy", merged=True), tensors_of(runs.whole, merged=True))


def test_inspect_lists_everything_and_says_what_is_elsewhere(runs: Runs, convert: Run) -> None:
    part, whole = (done(convert("inspect", run, "--all")).splitlines() for run in (runs.part, runs.whole))
    assert sorted(part[1:-1]) == sorted(whole[1:]) and part[0].split(":")[1] == whole[0].split(":")[1]
    assert part[-1].startswith(
        f"not in the checkpoint, but read from {runs.base}/checkpoints/step_000007 (init.weights)"
    )
    runs.base.rename(runs.base.with_name("moved"))
    code, printed, errors = convert("inspect", runs.part, "--all")
    assert code == 2 and printed.splitlines() == part[:-1] and "--base" in errors


def test_a_base_that_is_away_is_named_and_can_be_given(runs: Runs, convert: Run, tmp_path: Path) -> None:
    moved = runs.base.rename(tmp_path / "moved")
    out = tmp_path / "out"
    error = refused(convert("reshard", runs.part, "--out", out), out)
    for text in ("leaves out", f"init.weights={runs.base}", f"looked for {runs.base}", "--base init.weights=PATH"):
        assert text in error
    for given in (moved, f"init.weights={moved}/checkpoints/step_000007"):
        done(convert("reshard", runs.part, "--base", given, "--out", out))
        assert_equal(all_tensors(out), all_tensors(runs.whole))
        shutil.rmtree(out)
    assert "looked for /nowhere." in refused(convert("reshard", runs.part, "--base", "/nowhere", "--out", out), out)
    wrong = refused(convert("to-hf", runs.part, "--base", f"vision={moved}", "--out", out), out)
    assert "--base gives init.vision" in wrong and "takes what it leaves out from init.weights" in wrong


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["a", "b"], "give one PATH"), (["a", "vision=b"], "give one PATH"), (["vision=a", "init.vision=b"], "twice")],
)
def test_flags_that_contradict_each_other(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_base_paths(texts)
    assert read_base_paths(["x=y"]) == BasePaths(Path("x=y"))
    assert read_base_paths(["vision=a", "init.language=b"]).by_key.keys() == {"init.vision", "init.language"}


def test_a_base_with_other_weights_is_refused_by_name(runs: Runs, convert: Run, tmp_path: Path) -> None:
    other = random_weights(1)
    name = "layers.1.mlp.down_proj.weight"
    other[name][0, 0] += 1e-6
    save(tmp_path / "other", other, step=7)
    out = tmp_path / "out"
    error = refused(convert("reshard", runs.part, "--base", tmp_path / "other", "--out", out), out)
    other_base = f"{tmp_path}/other/checkpoints/step_000007 (not the step_000007 that the run began with)"
    assert error.startswith(f"convert: {name} of {other_base} is not what the run of {runs.part}")
    assert error.count("layers.") == 1, "no other tensor is named"
    del other[name]
    save(tmp_path / "smaller", other)
    error = refused(convert("reshard", runs.part, "--base", tmp_path / "smaller", "--out", out), out)
    assert "is of another model" in error and f"{name} are missing or of another shape" in error


def test_a_base_that_trained_on_is_found_while_its_checkpoint_is_there(runs: Runs) -> None:
    save(runs.base, random_weights(9), step=8)
    assert_equal(tensors_of(runs.part, merged=True), tensors_of(runs.whole, merged=True))
    shutil.rmtree(runs.base / "checkpoints/step_000007")
    with pytest.raises(CheckpointError, match=r"step_000008 \(not the step_000007 that the run began with\)"):
        tensors_of(runs.part, merged=True)


def test_a_base_may_leave_weights_out_itself(runs: Runs, tmp_path: Path) -> None:
    """A second run from the first: its base has merged adapters, whose sum is the same on every machine."""
    merged = tensors_of(runs.whole, merged=True)
    last = random_weights(5, PLAN)
    frozen = {name: merged[name] for name in last if not is_trained(name, PLAN)}
    trained = {name: tensor for name, tensor in last.items() if name not in frozen}
    second = save(tmp_path / "second", trained, record=record_of(frozen, runs.part))
    assert_equal(tensors_of(second, merged=False), frozen | {n: t for n, t in trained.items() if ".lora_" not in n})
    runs.base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=rf"{runs.part}/checkpoints/step_000002 leaves out .* looked for"):
        open_source(second)


def test_a_hugging_face_folder_is_a_base(runs: Runs, tmp_path: Path) -> None:
    weights, encoder = random_weights(3), "input_embedder.vision_encoder."
    frozen = {name: tensor for name, tensor in weights.items() if name.startswith(encoder)}
    modules = nn.ModuleDict({"module": build_model(MODEL, attention=MMA).input_embedder.vision_encoder})
    with torch.no_grad():
        for name, parameter in modules["module"].named_parameters():
            parameter.copy_(frozen[encoder + name])
    save_vision(modules["module"], MODEL.vision, tmp_path / "siglip")
    rest = {name: tensor for name, tensor in weights.items() if name not in frozen}
    part = save(tmp_path / "vision run", rest, record=record_of(frozen, tmp_path / "siglip", "init.vision"))
    assert_equal(tensors_of(part, merged=True), weights)
    moved = (tmp_path / "siglip").rename(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match=r"init\.vision=.*siglip, which is not there"):
        open_source(part)
    for given in (BasePaths(moved), BasePaths(None, {"init.vision": moved})):
        assert_equal(tensors_of(part, merged=True, base_paths=given), weights)


def test_merged_weights_do_not_depend_on_the_processor(runs: Runs) -> None:
    """They are sums in a fixed order, so that a run on another machine finds the same digests."""
    last = {name: tensor for name, tensor in all_tensors(runs.whole).items() if "layers.0.mlp.down" in name}
    first, second = (next(t for n, t in last.items() if f".lora_{letter}." in n) for letter in "AB")
    expected = last["weight.layers.0.mlp.down_proj.weight"]
    product = torch.zeros_like(expected)
    for column in range(LORA.rank):
        product = product + second[:, column, None] * first[column]
    merged = tensors_of(runs.whole, merged=True)["layers.0.mlp.down_proj.weight"]
    assert torch.equal(merged, expected + LORA.alpha / LORA.rank * product)


def test_digests_are_of_float32_values() -> None:
    tensor = torch.randn(6, 4).bfloat16()
    assert tensor_sha256(tensor) == tensor_sha256(tensor.float()) == tensor_sha256(tensor.t().contiguous().t())
    assert tensor_sha256(tensor) != tensor_sha256(tensor.t())


def damaged_records() -> Iterator[str]:
    yield from ("", "{", "[]", '{"bases": 3}', '{"bases": {"init.weights": {"tensors": {"a": 1}}}}')


def test_a_damaged_record_is_named_by_its_checkpoint(runs: Runs) -> None:
    file = files.find_checkpoint(runs.part) / FILE
    assert read_record(file.parent) is not None and read_record(None) is None
    for text in damaged_records():
        file.write_text(text)
        assert read_record(file.parent) is None
        with pytest.raises(CheckpointError, match=rf"{FILE} has \d+ bytes instead of"):
            open_source(runs.part)
