"""Measure how long saving a checkpoint pauses training, asynchronously against synchronously.

python tools/bench/saving.py                            # 600 MB of weights and moments, in the temp dir
python tools/bench/saving.py --megabytes 4000 --folder /scratch --device cuda
python tools/bench/saving.py --json saving.json         # also as an object

pause               seconds from the end of a step to the beginning of the next: the state is copied and, synchronously,
                    written, read back and published
complete            seconds until the checkpoint is published
step                seconds of a step while nothing is written
step while writing  seconds of a step while a checkpoint is written; synchronously there is no such step
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.console import Console, Table

HIDDEN_SIZE, BATCH_SIZE = 1024, 64
MODES = {"sync": False, "async": True}
BYTES_PER_PARAMETER = 12
"""A weight and two moments in float32."""


class Training:
    """A model with AdamW, and the state that a run of this size saves."""

    def __init__(self, megabytes: int, device: str) -> None:
        num_layers = max(1, round(megabytes * 1e6 / BYTES_PER_PARAMETER / HIDDEN_SIZE**2))
        layers = (nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE, bias=False, device=device) for _ in range(num_layers))
        self.model = nn.Sequential(*layers)
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.inputs = torch.randn(BATCH_SIZE, HIDDEN_SIZE, device=device)
        self.step()

    def step(self) -> float:
        """Take one optimizer step and return its seconds."""
        started = time.perf_counter()
        self.model(self.inputs).square().mean().backward()
        self.adamw.step()
        self.adamw.zero_grad()
        if self.inputs.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def state(self) -> dict[str, Tensor]:
        """Copies of weights and moments, as an engine's state is."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach().clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.adamw.state[parameter][moment].clone()
        return tensors


def measure(training: Training, folder: Path, saves: int, steps: int, *, async_save: bool) -> dict[str, float]:
    """Median seconds over ``saves`` checkpoints, each after ``steps`` steps during which nothing is written."""
    checkpointer = Checkpointer(folder, keep_last=1, async_save=async_save)
    pauses, completions, undisturbed, disturbed = [], [], [], []
    for number in range(saves):
        undisturbed += [training.step() for _ in range(steps)]
        started = time.perf_counter()
        checkpointer.save(number, training.state(), {})
        pauses.append(time.perf_counter() - started)
        while (saved := checkpointer.poll()) is None:
            disturbed.append(training.step())
        completions.append(saved.seconds)
    columns = {"pause": pauses, "complete": completions, "step": undisturbed, "step while writing": disturbed}
    return {name: statistics.median(seconds) for name, seconds in columns.items() if seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both modes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=600, help="weights and moments of this process")
    parser.add_argument("--saves", type=int, default=5, help="checkpoints of each kind")
    parser.add_argument("--steps", type=int, default=5, help="steps before each checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="on the disk that is measured (default: the system's temp dir)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    training = Training(options.megabytes, options.device)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for mode, async_save in MODES.items():
            path = Path(folder) / mode
            results[mode] = measure(training, path, options.saves, options.steps, async_save=async_save)
    table = Table("saving", *(f"{column}, s" for column in results["async"]))
    for mode, medians in results.items():
        table.add_row(mode, *(f"{seconds:.3f}" for seconds in medians.values()))
    Console().print(table)
    ratio = results["sync"]["pause"] / results["async"]["pause"]
    print(f"{options.megabytes} MB: the pause is {ratio:.1f} times shorter asynchronously")
    if options.json:
        options.json.write_text(json.dumps(results | {"ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
