"""launcher/sft.py with one rank that fails in a step: what test_rank_failure.py starts under each launcher.

AKI_TEST_FAILS is RANK:STEP:HOW, steps counted from 1.
"""

import os
import runpy
import signal
from pathlib import Path
from typing import Any

from aki_megatron.parallel.launch import discover_launch
from aki_megatron.train import main
from aki_megatron.train.loop import Run


def fail(how: str) -> None:
    if how == "raise":
        raise ArithmeticError("the answer\nis 43")
    assert how == "kill", how
    os.kill(os.getpid(), signal.SIGKILL)


rank, step, how = os.environ["AKI_TEST_FAILS"].split(":")
healthy_train = main.train


def train(run: Run) -> None:
    """The training loop around an engine that fails on one rank."""
    engine: Any = run.engine
    healthy_step, steps = engine.train_step, 0

    def train_step(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == int(step) and discover_launch(os.environ).rank == int(rank):
            fail(how)
        return healthy_step(*args)

    engine.train_step = train_step
    healthy_train(run)


main.train = train
runpy.run_path(str(Path(__file__).resolve().parents[2] / "launcher/sft.py"), run_name="__main__")
