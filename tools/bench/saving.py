"""How long a checkpoint holds training up: asynchronously against synchronously, side by side in one run.

python tools/bench/saving.py                            # 600 MB of weights and moments, written under /tmp
python tools/bench/saving.py --megabytes 4000 --folder /scratch --device cuda
python tools/bench/saving.py --json saving.json         # also as an object

pause       from the end of a step to the beginning of the next: the state is copied and, synchronously, written,
            read back and published
complete    until the checkpoint is there
step        duration of a step while nothing is written, and while it is (synchronously there is none)
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from aki_megatron.checkpoint.checkpointer import Checkpointer

WIDTH, ROWS = 1024, 64
MODES = {"synchronous": False, "asynchronous": True}
BYTES_PER_PARAMETER = 12
"""A weight and two moments in float32."""


class Training:
    """Layers, AdamW, and the state that a run of this size would save."""

    def __init__(self, megabytes: int, device: str) -> None:
        layers = max(1, round(megabytes * 1e6 / BYTES_PER_PARAMETER / WIDTH**2))
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, device=device) for _ in range(layers)))
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.inputs = torch.randn(ROWS, WIDTH, device=device)
        self.step()

    def step(self) -> float:
        """One optimizer step; its seconds."""
        started = time.perf_counter()
        self.model(self.inputs).square().mean().backward()
        self.adamw.step()
        self.adamw.zero_grad()
        if self.inputs.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def state(self) -> dict[str, Tensor]:
        """Copies, as an engine's state is."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[f"weight.{name}"] = parameter.detach().clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"{moment}.{name}"] = self.adamw.state[parameter][moment].clone()
        return found


def measured(train: Training, folder: Path, saves: int, steps: int, *, asynchronous: bool) -> dict[str, float]:
    """Medians in seconds over ``saves`` checkpoints, each after ``steps`` steps during which nothing is written."""
    saver = Checkpointer(folder, keep_last=1, async_save=asynchronous)
    pauses, completes, quiet, busy = [], [], [], []
    for number in range(saves):
        quiet += [train.step() for _ in range(steps)]
        started = time.perf_counter()
        saver.save(number, train.state(), {})
        pauses.append(time.perf_counter() - started)
        while (saved := saver.poll()) is None:
            busy.append(train.step())
        completes.append(saved.seconds)
    columns = {"pause": pauses, "complete": completes, "step": quiet, "step while writing": busy}
    return {name: statistics.median(seconds) for name, seconds in columns.items() if seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=600, help="weights and moments of this process")
    parser.add_argument("--saves", type=int, default=5, help="checkpoints of each kind")
    parser.add_argument("--steps", type=int, default=5, help="steps before each checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="on the disk that is measured (default: the system's for such)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    train = Training(options.megabytes, options.device)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, asynchronous in MODES.items():
            found[name] = measured(train, Path(folder) / name, options.saves, options.steps, async_save=asynchronous)
    table = Table("saving", *(f"{column}, s" for column in found["asynchronous"]))
    for name, row in found.items():
        table.add_row(name, *(f"{seconds:.3f}" for seconds in row.values()))
    Console().print(table)
    ratio = found["synchronous"]["pause"] / found["asynchronous"]["pause"]
    print(f"{options.megabytes} MB: the pause is {ratio:.1f} times shorter asynchronously")
    if options.json:
        options.json.write_text(json.dumps(found | {"ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
