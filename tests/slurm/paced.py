"""Start a script of the project as the interpreter would; the site file of the tests names this as PYTHON.

Before each training step it follows the file AKI_TEST_ORDERS: {"seconds": 0.5}, {"hang": RANK}, {"raise": RANK}.
The disk of the node AKI_TEST_BAD_NODE is broken.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def pace_training() -> None:
    from aki_megatron.train.loop import Trainer

    healthy_train = Trainer.train

    def train(trainer: Trainer) -> bool:
        engine: Any = trainer.engine
        healthy_step = engine.train_step

        def train_step(*args: Any, **settings: Any) -> Any:
            follow_orders(json.loads(Path(os.environ["AKI_TEST_ORDERS"]).read_text()), int(os.environ["SLURM_PROCID"]))
            return healthy_step(*args, **settings)

        engine.train_step = train_step
        return healthy_train(trainer)

    Trainer.train = train  # type: ignore[method-assign]


def follow_orders(orders: dict[str, Any], rank: int) -> None:
    if orders.get("raise") == rank:
        raise ArithmeticError("the answer is 43")
    time.sleep(100_000 if orders.get("hang") == rank else orders.get("seconds", 0))


def break_disk() -> None:
    def fsync(file: int) -> None:
        raise OSError("Input/output error")

    os.fsync = fsync


sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
if Path(sys.argv[0]).parent.name == "launcher":
    pace_training()
elif os.environ.get("AKI_TEST_BAD_NODE") == os.environ["SLURMD_NODENAME"]:
    break_disk()
runpy.run_path(sys.argv[0], run_name="__main__")
