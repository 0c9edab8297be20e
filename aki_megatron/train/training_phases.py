"""Phases of a run that train different parts: the phase of a step or of a checkpoint, and the change to the next."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aki_megatron.config.run import RunConfig
from aki_megatron.engine.base import Engine
from aki_megatron.engine.phased import PhasedEngine
from aki_megatron.model.stage import Stage
from aki_megatron.supervise.progress import CHANGING_PHASE
from aki_megatron.train.continuation import read_data_step
from aki_megatron.train.run_summary import trained_text


def saved_phase(config: RunConfig, checkpoint: Path | None) -> int:
    """Return the phase whose optimizer state a checkpoint holds: that of the last data step before it was saved."""
    data_step = read_data_step(checkpoint) if checkpoint and len(config.data.phases) > 1 else 0
    return config.training_phase(max(data_step - 1, 0))


def build_phased_engine(
    config: RunConfig,
    build: Callable[..., Engine],
    initializer: Callable[[Stage], None],
    checkpoint: Path | None,
) -> PhasedEngine:
    """Build the engine of the phase in which a run begins, or in which it saved ``checkpoint``; collective.

    build        build_engine without its last arguments, init_weights and training_phase
    initializer  sets the weights from which the run starts
    """

    def rebuild(phase: int, **more: Any) -> Engine:
        return build(training_phase=phase, **more)

    first = saved_phase(config, checkpoint)
    return PhasedEngine(rebuild(first, init_weights=initializer), config.training_plans(), first, rebuild=rebuild)


def enter_phase(
    config: RunConfig,
    engine: PhasedEngine,
    data_step: int,
    *,
    record: Callable[[str], None],
    set_phase: Callable[[str], None],
) -> None:
    """Let the engine train what the phase of this data step, counted from 0, trains; record a change. Collective."""
    phase = config.training_phase(data_step)
    if not engine.trains_alike(phase):
        set_phase(CHANGING_PHASE)
        engine.enter_phase(phase)
        record(f"phase {phase + 1} of {len(config.data.phases)}: {trained_text(config, phase)}")
    engine.phase = phase
