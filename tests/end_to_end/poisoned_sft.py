"""launcher/sft.py on data of which some steps spoil the gradients; test_rollback.py starts it.

AKI_TEST_FACTORS  JSON: number of a data step, from 1 -> factor by which the gradients of the last rank are multiplied
AKI_TEST_OMITS    JSON: numbers of data steps that are left out, as if they did not exist
AKI_TEST_KILL     number of a data step at which every rank is killed; 0: none
"""

import json
import os
import runpy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from aki_megatron.engine.base import ShardedStage
from aki_megatron.parallel.launch import discover_launch
from aki_megatron.train import build
from aki_megatron.train.loop import Trainer

launch = discover_launch(os.environ)
factors = {int(number): float(factor) for number, factor in json.loads(os.environ["AKI_TEST_FACTORS"]).items()}
omits = set(json.loads(os.environ["AKI_TEST_OMITS"]))
healthy_train, healthy_build = Trainer.train, build.build_sharded_stage
data_step = 0


def train(trainer: Trainer) -> bool:
    """Train on such data."""
    loader: Any = trainer.loader
    healthy_steps = loader.steps

    def steps(start: int, state: Any) -> Iterator[Any]:
        global data_step
        for data_step, loaded in enumerate(healthy_steps(start, state), start + 1):
            if data_step == int(os.environ["AKI_TEST_KILL"]):
                os.kill(os.getpid(), signal.SIGKILL)
            if data_step not in omits:
                yield loaded

    loader.steps = steps
    return healthy_train(trainer)


def build_sharded_stage(*args: Any) -> ShardedStage:
    """Build a stage whose gradients are scaled on the last rank."""

    def scale(gradient: Tensor) -> Tensor:
        return gradient * factors.get(data_step, 1.0)

    sharded = healthy_build(*args)
    if launch.rank == launch.world_size - 1:
        for parameter in sharded.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(scale)
    return sharded


Trainer.train = train  # type: ignore[method-assign]
build.build_sharded_stage = build_sharded_stage
runpy.run_path(str(Path(__file__).resolve().parents[2] / "launcher/sft.py"), run_name="__main__")
