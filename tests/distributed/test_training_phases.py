"""Phases that train different parts: equal to one process, and resumed inside any phase under another layout."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import LAYOUTS, Layout
from tiny import OPTIMIZER, Setting, Trained, difference, own_batches, rank_batches, tiny_engine, tiny_model
from torch import nn

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.config.trainable import PhaseTrainable, TrainableConfig
from aki_megatron.engine import global_state
from aki_megatron.engine.optimizer import adamw
from aki_megatron.engine.phased import PhasedEngine
from aki_megatron.model.trainable import part_plan
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import stack_ids

pytestmark = pytest.mark.distributed
LIMIT = 1e-5
FROZEN = {"embeddings": "frozen", "head": "frozen"}
PHASES = tuple(
    PhaseTrainable.model_validate(phase)
    for phase in (
        FROZEN | {"decoder": "frozen"},
        {"vision": {"mode": "full", "lr_factor": 0.1}},
        FROZEN | {"resampler": "frozen"},
        {},
    )
)
"""Resampler first; then all and the encoder; then the decoder alone; then all but the encoder, some of it anew."""
FULL = Setting(phases=PHASES, clip=2.0)
LORA = Setting(trainable=TrainableConfig.model_validate({"decoder": "lora", "lora": {"rank": 3}}), phases=PHASES[:2])
LORA = replace(LORA, phases=(PHASES[0], PhaseTrainable()), clip=2.0)
STEPS_OF_PHASE = 2
RATE = 3e-4
"""At 2e-3 the order of the micro-batches alone gives 2e-5, which a gradient near eps enlarges."""


def phase_of(step: int) -> int:
    return step // STEPS_OF_PHASE


@cache
def plain(setting: Setting) -> Trained:
    """One process, plain torch: at a border a new AdamW takes over the state of what goes on training."""
    losses, norms, weights = [], [], {}
    state: dict[str, dict[str, torch.Tensor]] = {}
    for phase in range(len(setting.phases)):
        now = replace(setting, phase=phase)
        model = tiny_model(now)
        parameters = dict(model.named_parameters())
        optimizer = adamw(model, **OPTIMIZER, plan=now.plan)
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        before = replace(setting, phase=max(phase - 1, 0)).plan
        for name, parameter in parameters.items():
            goes_on = part_plan(name, before).mode != "frozen" and part_plan(name, now.plan).mode != "frozen"
            if parameter.requires_grad and goes_on and name in state:
                optimizer.state[parameter] = state[name]
        for step in range(phase * STEPS_OF_PHASE, (phase + 1) * STEPS_OF_PHASE):
            batches = rank_batches(step, 0, 1)
            supervised = sum(batch.supervised_tokens for batch in batches)
            optimizer.zero_grad()
            losses.append(0.0)
            for batch in batches:
                loss = model(batch.token_ids, stack_ids(batch), batch.media) / supervised
                loss.backward()
                losses[-1] += loss.item()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), setting.max_grad_norm)))
            for group in optimizer.param_groups:
                group["lr"] = RATE * group["lr_factor"]
            optimizer.step()
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        state = {name: optimizer.state[parameters[name]] for name in parameters if parameters[name] in optimizer.state}
    return Trained(losses, norms, weights)


def phased(topology: Topology, setting: Setting, phase: int, **first: Any) -> PhasedEngine:
    """The engine of a phase; ``first`` are further arguments of the first build."""
    plans = [replace(setting, phase=number).plan for number in range(len(setting.phases))]

    def build(phase: int, **more: Any):
        return tiny_engine(topology, replace(setting, phase=phase), **more)

    return PhasedEngine(build(phase, **first), plans, phase, rebuild=build)


def run(engine: PhasedEngine, topology: Topology, first: int, last: int) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in range(first, last):
        engine.enter_phase(phase_of(step))
        report = engine.train_step(own_batches(step, topology), RATE)
        losses.append(report.loss)
        norms.append(report.grad_norm)
    return losses, norms


def train(topology: Topology, setting: Setting, folder: Path, first: int, last: int) -> Trained:
    """Steps ``first`` to ``last``, from what is saved after ``first`` and saving after ``last``."""
    checkpointer = Checkpointer(folder, keep_last=9)
    engine = phased(topology, setting, phase_of(max(first - 1, 0)))
    if first:
        tensors = engine.state_dict()
        checkpointer.load(folder / f"step_{first:06d}", tensors)
        engine.load_state_dict(tensors)
    losses, norms = run(engine, topology, first, last)
    checkpointer.save(last, engine.state_dict(), {})
    return Trained(losses, norms, {name: weight.clone() for name, weight in engine.named_weights()})


SPREADS = ["TP2 x PP2 x DP2, ZeRO-3", "PP2 x 2 virtual stages x DP2, ZeRO-2", "1 process, no ZeRO", "PP4, ZeRO-1"]


@pytest.mark.parametrize("setting", [FULL, LORA], ids=["full", "lora"])
def test_phases_under_changing_layouts_equal_one_process(pool, tmp_path, setting):
    """Begin in one layout; resume after the first step of a phase and at a border, each time in another layout."""
    last = STEPS_OF_PHASE * len(setting.phases)
    borders = [0, 1, *range(STEPS_OF_PHASE + 1, last - 1, STEPS_OF_PHASE + 1), last]
    losses, norms, weights = [], [], {}
    for number, (first, end) in enumerate(zip(borders, borders[1:], strict=False)):
        layout: Layout = LAYOUTS[SPREADS[number % len(SPREADS)]]
        spread = replace(setting, zero_stage=layout.zero_stage, virtual_stages=layout.virtual_stages)
        sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline}
        results = pool.run(layout.ranks, train, spread, tmp_path, first, end, **sizes)
        losses += results[0].losses
        norms += results[0].norms
        weights = {name: weight for result in results for name, weight in result.weights.items()}
    assert difference(Trained(losses, norms, weights), plain(setting)) <= LIMIT


def test_the_reference_would_differ_with_another_number_of_updates(monkeypatch):
    """Otherwise equality would not prove the count of the bias correction."""
    right = plain.__wrapped__(FULL)
    monkeypatch.setitem(OPTIMIZER, "beta2", 0.999)
    assert difference(plain.__wrapped__(FULL), right) > 10 * LIMIT


def state_after(topology: Topology, setting: Setting, last: int) -> dict[str, float]:
    engine = phased(topology, setting, 0)
    run(engine, topology, 0, last)
    state = engine.state_dict()
    return {name: float(global_state.gather(tensor).abs().sum()) for name, tensor in state.items()}


def test_state_is_of_what_trains_alone(pool):
    """Counts since a part began, moments of the parts of the phase, in names that no layout changes."""
    (one,) = pool.run(1, state_after, replace(FULL, zero_stage=1), 5)
    counts = {name: value for name, value in one.items() if name.startswith(global_state.STEP)}
    assert counts == {"optimizer.step": 5.0, "optimizer.step.1": 3.0}
    parts = {name.split(".")[1] for name in one if name.startswith("exp_avg.")}
    assert parts == {"layers"}, "the decoder, which began in phase 1; the first moments of the others are gone"
    spread = pool.run(4, state_after, replace(FULL, zero_stage=2), 5, tensor=2, pipeline=2)
    names = {name for state in spread for name in state}
    assert names == one.keys()
