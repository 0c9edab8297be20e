"""Which phase a step and a checkpoint belong to, and when the engine is built anew."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from aki_megatron.checkpoint import files
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.engine.phased import PhasedEngine
from aki_megatron.train.training_phases import enter_phase, saved_phase

SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"
PHASES = "[{steps: 2, trainable: {decoder: frozen}}, {steps: 3}, {steps: 4, sources: [vqav2]}]"


def run() -> RunConfig:
    flags = ["--data.phases", PHASES, "--train.steps", "9", "--optimizer.warmup_steps", "1"]
    return load_run(["--config", str(SFT), *flags], default_config=SFT, prog="sft.py", description="A.")


def test_a_checkpoint_is_of_the_phase_of_its_last_data_step(tmp_path: Path) -> None:
    phases = []
    for data_step in (0, 1, 2, 3, 5, 6, 20):
        (tmp_path / files.EXTRA).write_text(json.dumps({"extra": {"data_step": data_step}}))
        phases.append(saved_phase(run(), tmp_path))
    assert phases == [0, 0, 0, 1, 1, 2, 2]
    assert saved_phase(run(), None) == 0


def test_the_engine_is_built_anew_only_where_something_else_trains() -> None:
    built: list[int] = []

    def engine(phase: int) -> Any:
        built.append(phase)
        state = {"weight.layers.0.w": torch.tensor(float(phase)), "exp_avg.lm_head.w": torch.tensor(float(phase))}
        if phase:
            state["exp_avg.layers.0.w"] = torch.tensor(0.0)
        loaded: dict[str, Any] = {}
        return SimpleNamespace(state_dict=lambda: dict(state), load_state_dict=loaded.update, loaded=loaded)

    phased, recorded = PhasedEngine(engine(0), run().training_plans(), 0, rebuild=engine), list[str]()
    for data_step in range(9):
        enter_phase(run(), phased, data_step, record=recorded.append, set_phase=lambda name: None)
    assert built == [0, 1] and phased.phase == 2
    assert len(recorded) == 1 and recorded[0].startswith("phase 2 of 3: ") and "decoder" in recorded[0]
    loaded: Any = phased._present
    assert {name: float(value) for name, value in loaded.loaded.items()} == {
        "weight.layers.0.w": 0.0,
        "exp_avg.lm_head.w": 0.0,
        "exp_avg.layers.0.w": 0.0,
    }
    phased.select_phase(0)  # a rollback
    assert built == [0, 1, 0]
