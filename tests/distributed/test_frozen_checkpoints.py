"""Checkpoints without frozen weights: a run resumes from one to the bits of a whole one, under any layout.

The frozen weights are those of a run that ended before; other ones are refused by name.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from own_run import own_run, write_own_data
from test_training_phases import phased
from tiny import MODEL, Setting, own_batches

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.base_weights import open_source
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import WEIGHT, CheckpointSource
from aki_megatron.checkpoint.frozen_record import FILE, read_record
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.run import InitConfig, RunConfig
from aki_megatron.config.save import dump_model
from aki_megatron.config.trainable import PhaseTrainable, TrainableConfig
from aki_megatron.console import IsolatedConsole
from aki_megatron.errors import CheckpointError
from aki_megatron.model.stage import build_model
from aki_megatron.parallel.topology import Topology
from aki_megatron.supervise.progress import ProgressTracker
from aki_megatron.supervise.signals import StopSignals
from aki_megatron.train.build import build_trainer
from aki_megatron.train.frozen_parameters import FrozenParameters
from aki_megatron.train.main import missing_inputs

pytestmark = pytest.mark.distributed

LORA = ["--trainable.decoder.mode", "lora", "--trainable.embeddings.mode", "frozen", "--trainable.lora.rank", "3"]
EXCLUDE, WHOLE = (["--checkpoint.exclude_frozen_parameters", word] for word in ("true", "false"))
PIPELINE = ["--parallel.pipeline", "2", "--parallel.zero_stage", "2"]
DATA = ["--parallel.zero_stage", "3", "--train.precision", "fp32"]


def train_all(topology: Topology, configs: list[RunConfig]) -> list[list[str]]:
    """Train runs one after another; the lines that rank 0 prints of each, or of an error that is one."""
    printed: list[list[str]] = []
    for config in configs:
        config.run.dir.mkdir(exist_ok=True)
        console, lines = IsolatedConsole(quiet=True), list[str]()
        console.print = lambda *objects, lines=lines, **_: lines.append(" ".join(map(str, objects)))  # type: ignore[assignment]
        try:
            trainer = build_trainer(
                config,
                topology,
                console,
                attempt="test",
                stop_signals=StopSignals(),
                tracker=ProgressTracker(config.watch),
            )
            trainer.train()
        except CheckpointError as error:
            lines.append(f"CheckpointError: {error}")
        printed.append(lines)
    return printed


def losses(config: RunConfig) -> list[tuple[int, float, float]]:
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]


def interrupted(config: RunConfig, *flags: str, root: Path, name: str) -> RunConfig:
    """A copy of a run, killed before its last checkpoint, that goes on with other flags."""
    folder = config.run.dir.with_name(name)
    shutil.copytree(config.run.dir, folder)
    (folder / "DONE").unlink()
    shutil.rmtree(files.find_checkpoint(folder))
    return own_run(root, folder, "--init.weights", str(config.init.weights), *LORA, *flags)


def test_a_run_resumes_to_the_bits_of_whole_checkpoints(pool, tmp_path):
    root = write_own_data(tmp_path / "data")
    base = own_run(root, tmp_path / "base", "--train.steps", "2", "--optimizer.warmup_steps", "0")
    pool.run(1, train_all, [base])
    flags = ["--init.weights", str(base.run.dir), *LORA]
    part = own_run(root, tmp_path / "part", *flags, *EXCLUDE, *PIPELINE)
    whole = own_run(root, tmp_path / "whole", *flags, *PIPELINE)
    (lines, _), _ = pool.run(2, train_all, [part, whole], pipeline=2)
    assert losses(part) == losses(whole) and len(losses(part)) == 4
    stored = {name for name in CheckpointSource(part.run.dir, optimizer_state=True).specs if name.startswith(WEIGHT)}
    record = read_record(files.find_checkpoint(part.run.dir))
    assert record is not None and record.tensors.keys().isdisjoint(name.removeprefix(WEIGHT) for name in stored)
    assert all(".lora_" in name or "resampler" in name or "lm_head" in name for name in stored)
    (line,) = [line for line in lines if line.startswith("checkpoints: leave out ")]
    assert f"they stay in init.weights={base.run.dir}/checkpoints/step_000002, which must not change" in line
    expected = CheckpointSource(whole.run.dir)
    opened = open_source(part.run.dir)
    assert opened.specs.keys() == expected.specs.keys()
    assert all(torch.equal(opened.get(name), expected.get(name)) for name in expected.specs)

    # two ranks that both hold everything; the base has trained on, and its checkpoint is still there
    pool.run(1, train_all, [own_run(root, base.run.dir, "--train.steps", "3", "--optimizer.warmup_steps", "0")])
    again = [interrupted(run, *DATA, *mode, root=root, name=f"{run.run.dir.name} again")
             for run, mode in ((part, EXCLUDE), (whole, WHOLE))]  # fmt: skip
    # a run may change its mind; from a whole checkpoint it leaves out what is proven to be the same
    began_with = ["--init.weights", str(base.run.dir / "checkpoints/step_000002")]
    again += [interrupted(run, *DATA, *mode, root=root, name=f"{run.run.dir.name} otherwise")
              for run, mode in ((part, WHOLE), (whole, [*EXCLUDE, *began_with]))]  # fmt: skip
    refused = interrupted(whole, *DATA, *EXCLUDE, root=root, name="refused")
    printed, _ = pool.run(2, train_all, [*again, refused])
    assert "step_000003 holds other weights than" in printed[-1][-1], "the newest of the base is another one"
    for run, lines in zip(again, printed, strict=False):
        assert losses(run) == losses(again[1]), run.run.dir
        assert "resuming after step 2, 4 steps in all" in lines and lines[-1].startswith("done"), lines
    names = [list(CheckpointSource(run.run.dir).specs) for run in again]
    assert sorted(names[0]) == sorted(names[3]) and sorted(names[1]) == sorted(names[2])
    assert len(names[0]) < len(names[1])


def test_other_frozen_weights_are_refused_by_name(pool, tmp_path):
    root = write_own_data(tmp_path / "data")
    bases = [own_run(root, tmp_path / name, "--train.steps", "2", "--optimizer.warmup_steps", "0", *more)
             for name, more in (("base", []), ("other", ["--trainable.embeddings.mode", "frozen"]))]  # fmt: skip
    part = own_run(root, tmp_path / "part", "--init.weights", str(bases[0].run.dir), *LORA, *EXCLUDE)
    pool.run(1, train_all, [*bases, part])
    # the other run trained all but the embeddings to other values, from the same random ones
    other = interrupted(part, "--init.weights", str(bases[1].run.dir), *EXCLUDE, root=root, name="other start")
    (found, *_) = [lines for (lines,) in pool.run(2, train_all, [other], tensor=2)]
    assert found[-1].startswith(f"CheckpointError: {other.run.dir}/checkpoints/step_000002 leaves out what its run")
    assert "input_embedder.token_embedding.base.weight" in found[-1] and "have another sha256" in found[-1]
    assert f"Bring back {bases[0].run.dir} (step_000002), or say where it is now (--init.weights PATH)." in found[-1]
    # before any rank starts, a base that is away is named
    shutil.rmtree(bases[1].run.dir)
    assert missing_inputs(other) == [f"{bases[1].run.dir} (init.weights)"]
    whole = interrupted(part, "--init.weights", str(bases[1].run.dir), root=root, name="whole start")
    (files.find_checkpoint(whole.run.dir) / FILE).unlink()
    assert missing_inputs(whole) == []


def test_nothing_is_left_out_where_no_file_holds_it(pool, tmp_path):
    """Random weights stay in checkpoints: they are not the same on every processor."""
    root = write_own_data(tmp_path / "data")
    run = own_run(root, tmp_path / "run", *LORA, *EXCLUDE, "--train.steps", "2")
    ((lines,),) = pool.run(1, train_all, [run])
    assert "checkpoints: leave nothing out (checkpoint.exclude_frozen_parameters): none is from init.*" in lines
    assert read_record(files.find_checkpoint(run.run.dir)) is None


FROZEN = {"embeddings": "frozen", "decoder": "frozen", "head": "frozen"}
PHASES = tuple(map(PhaseTrainable.model_validate, (FROZEN, FROZEN | {"head": "full"}, FROZEN | {"embeddings": "full"})))
"""The resampler in all phases; the decoder and the encoder in none; the embeddings in a phase that is added later."""


def with_phases(config: RunConfig, phases: tuple[PhaseTrainable, ...], weights: Path) -> RunConfig:
    section = [{"steps": 1, "trainable": phase.model_dump(mode="json")} for phase in phases]
    data = config.data.model_validate(config.data.model_dump() | {"phases": section})
    update = {"model": MODEL, "init": InitConfig(weights=weights), "trainable": TrainableConfig(), "data": data}
    return config.model_copy(update=update)


def roll_back_after_change(topology: Topology, config: RunConfig, setting: Setting, folder: Path) -> dict[str, bool]:
    """Save in phase 0, go on with a phase more, train, and roll back. Whether each weight is what was saved."""
    weights = config.init.weights
    assert weights is not None
    checkpointer = Checkpointer(folder, keep_last=1)
    first = FrozenParameters(with_phases(config, PHASES[:2], weights), topology, None)
    engine = phased(topology, replace(setting, phases=PHASES[:2]), 0, init_weights=first.initializer())
    first.check_built(engine)
    engine.train_step(own_batches(0, topology), 1e-2)
    saved = {name: weight.clone() for name, weight in engine.named_weights()}
    checkpointer.save(1, engine.state_dict(first.is_saved), {"step": 1}, rank_files=first.files())
    checkpoint = files.find_checkpoint(folder)

    changed = FrozenParameters(with_phases(config, PHASES, weights), topology, checkpoint)
    engine = phased(topology, setting, 0, init_weights=changed.initializer())
    changed.check_built(engine)
    assert changed.load(engine, checkpointer, checkpoint) == {"step": 1}
    for phase in (1, 2):
        engine.enter_phase(phase)
        engine.train_step(own_batches(phase, topology), 1e-2)
    moved = {name for name, weight in engine.named_weights() if not torch.equal(weight, saved[name])}
    changed.load(engine, checkpointer, checkpoint, 0)
    back = {name: torch.equal(weight, saved[name]) for name, weight in engine.named_weights()}
    table = "input_embedder.token_embedding.base.weight"
    assert (table in moved) == (table in back), "otherwise the rollback has nothing to undo"
    assert first.is_saved(table) is False and changed.is_saved(table) is True
    return back


@pytest.mark.parametrize(("ranks", "pipeline", "zero_stage"), [(1, 1, 0), (2, 2, 2)])
def test_a_rollback_restores_what_a_later_phase_trains(pool, tmp_path, ranks, pipeline, zero_stage):
    """The checkpoint leaves out the embeddings, which train in a phase that the run got when it went on."""
    config = own_run(tmp_path / "data", tmp_path / "run", *EXCLUDE)
    model = build_model(MODEL, attention=AttentionConfig(rule="mma"), seed=5)
    weights = {WEIGHT + name: parameter.detach() for name, parameter in model.named_parameters()}
    yaml = dump_model(MODEL, AttentionConfig(rule="mma"))
    Checkpointer(tmp_path / "base", keep_last=1, config_yaml=yaml).save(1, weights, {})
    config = config.model_copy(update={"init": InitConfig(weights=tmp_path / "base")})
    setting = Setting(zero_stage=zero_stage, phases=PHASES)
    results = pool.run(ranks, roll_back_after_change, config, setting, tmp_path / "saved", pipeline=pipeline)
    back = {name: equal for result in results for name, equal in result.items()}
    assert back.keys() == dict(model.named_parameters()).keys() and all(back.values())
