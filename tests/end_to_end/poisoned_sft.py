"""launcher/sft.py on data of which some steps do harm: what test_rollback.py starts.

AKI_TEST_HARM   JSON: number of a step of the data, from 1 -> by what the gradients of the last rank are multiplied
AKI_TEST_OMITS  JSON: numbers of steps of the data that are left out, as if there were none
AKI_TEST_KILL   number of a step of the data at which every rank is killed; 0: none
"""

import json
import os
import runpy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from aki_megatron.parallel.launch import discover_launch
from aki_megatron.train import main
from aki_megatron.train.loop import Run

launch = discover_launch(os.environ)
harm = {int(number): float(factor) for number, factor in json.loads(os.environ["AKI_TEST_HARM"]).items()}
omits = set(json.loads(os.environ["AKI_TEST_OMITS"]))
healthy_train = main.train


def train(run: Run) -> bool:
    """The training loop over such data."""
    engine: Any = run.engine
    loader: Any = run.loader
    healthy_steps, now = loader.steps, 0

    def steps(start: int, state: Any) -> Iterator[Any]:
        nonlocal now
        for now, loaded in enumerate(healthy_steps(start, state), start + 1):
            if now == int(os.environ["AKI_TEST_KILL"]):
                os.kill(os.getpid(), signal.SIGKILL)
            if now not in omits:
                yield loaded

    def harmed(gradient: Tensor) -> Tensor:
        return gradient * harm.get(now, 1.0)

    loader.steps = steps
    if launch.rank == launch.world_size - 1:
        for runner in engine._runners:
            for parameter in runner.stage.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(harmed)
    return healthy_train(run)


main.train = train
runpy.run_path(str(Path(__file__).resolve().parents[2] / "launcher/sft.py"), run_name="__main__")
