"""launcher/sft.py with one rank that fails in a step; other tests start it under each launcher.

AKI_TEST_FAILS is RANK:STEP:HOW, steps counted from 1. HOW "worker": a process of its loader fails, at about that step.
"""

import os
import runpy
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aki_megatron.data.loader import MicrobatchDataset
from aki_megatron.parallel.launch import discover_launch
from aki_megatron.supervise import watchdog
from aki_megatron.train.loop import Trainer

watchdog.RESPONSE_SECONDS = 8.0  # how long an unresponsive rank is waited for


def fail(how: str) -> None:
    if how == "raise":
        raise ArithmeticError("the answer\nis 43")
    assert how in ("kill", "stop"), how
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


rank, step, how = os.environ["AKI_TEST_FAILS"].split(":")
healthy_train, healthy_load = Trainer.train, MicrobatchDataset._load
loads = 0


def sleep_in_the_loader(steps: Iterator[Any]) -> Iterator[Any]:
    """Yield the data steps, of which one never comes."""
    for number, loaded in enumerate(steps, 1):
        if number == int(step):
            time.sleep(3600)
        yield loaded


def failing_load(dataset: MicrobatchDataset, plan: Any) -> Any:
    """Load a micro-batch, of which this process fails to load the last."""
    global loads
    loads += 1
    if loads >= int(step):
        raise ArithmeticError("the answer is 43")
    return healthy_load(dataset, plan)


def train(trainer: Trainer) -> bool:
    """Train with an engine, or a loader, that fails on one rank."""
    if discover_launch(os.environ).rank != int(rank):
        return healthy_train(trainer)
    engine: Any = trainer.engine
    loader: Any = trainer.loader
    healthy_step, healthy_steps, steps = engine.train_step, loader.steps, 0

    def train_step(*args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == int(step):
            fail(how)
        return healthy_step(*args, **options)

    if how == "worker":
        MicrobatchDataset._load = failing_load  # type: ignore[method-assign]
    elif how == "sleep":
        loader.steps = lambda *args: sleep_in_the_loader(healthy_steps(*args))
    else:
        engine.train_step = train_step
    return healthy_train(trainer)


Trainer.train = train  # type: ignore[method-assign]
runpy.run_path(str(Path(__file__).resolve().parents[2] / "launcher/sft.py"), run_name="__main__")
