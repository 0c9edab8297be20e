"""Measure whether a long run stays as it began: memory, open files, threads, child processes, step time.

python tools/bench/long_run.py                          # 2,000 steps of the demo's model on the CPU, some minutes
python tools/bench/long_run.py --steps 20000 --json long_run.json
python tools/bench/long_run.py --folder /scratch/long -- --data.num_workers 4     # flags of the launcher after --

The run has its defaults: wandb (offline) and TensorBoard on, loader workers, asynchronous checkpoints. Its process is
looked at five times a second. The first and the last quarter of the steps are compared; the first tenth is left out,
because caches fill and the allocator settles there.

memory     resident memory of the process that trains, without its children, MiB
files      open files; threads; children: the loader's workers and wandb's service
step       median seconds of a step, without those beside which a checkpoint is written

Exit code: 0 flat, 1 something grew. Times tell something on an otherwise idle machine only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from aki_megatron.console import Console, Table
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT_INTERVAL = 100
SAMPLE_SECONDS = 0.2

GROWTH: dict[str, Callable[[float], float]] = {
    "memory": lambda first: 1.05 * first,
    "files": lambda first: first + 4,
    "threads": lambda first: first + 2,
    "children": lambda first: first,
    "step": lambda first: 1.05 * first,
}
"""The most that the last quarter may have, given the first."""


@dataclass(frozen=True)
class Sample:
    """The process at one moment."""

    step: int
    memory: float
    files: int
    threads: int
    children: int


def run_flags(folder: Path, steps: int) -> list[str]:
    """Return the flags of a run of ``steps`` optimizer steps in ``folder``."""
    return [
        "--config", str(ROOT / "configs/demo/sft.yaml"), "--run.dir", str(folder / "run"),
        "--data.root", str(folder / "data"), "--data.tokenizer", str(folder / "data/tokenizer"),
        "--train.steps", str(steps), "--train.global_batch_size", "4", "--train.micro_batch_size", "4",
        "--checkpoint.interval", str(CHECKPOINT_INTERVAL), "--log.wandb", "offline", "--init.weights", "null",
        "--parallel.zero_stage", "0", "--model.decoder.num_layers", "2",
    ]  # fmt: skip


def watch(process: subprocess.Popen[bytes], paths: RunPaths) -> list[Sample]:
    """Look at a process again and again until it ends."""
    looked_at, samples = psutil.Process(process.pid), list[Sample]()
    while process.poll() is None:
        try:
            with looked_at.oneshot():
                samples.append(
                    Sample(
                        paths.metrics.read_bytes().count(b"\n") if paths.metrics.exists() else 0,
                        looked_at.memory_info().rss / 2**20,
                        looked_at.num_fds(),
                        looked_at.num_threads(),
                        len(looked_at.children()),
                    )
                )
        except psutil.Error:  # it has just ended
            break
        time.sleep(SAMPLE_SECONDS)
    process.wait()
    return samples


def compare(samples: Sequence[Sample], seconds: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Return the medians of the first and the last quarter by name; ``seconds``: of each step."""
    steps = len(seconds)
    quarters = (range(steps // 10, steps // 10 + steps // 4), range(steps - steps // 4, steps))
    inside = [[sample for sample in samples if sample.step in quarter] for quarter in quarters]
    if not all(inside):
        raise ValueError("the run was too short to be looked at")
    found = {
        name: tuple(statistics.median(getattr(sample, name) for sample in part) for part in inside)
        for name in ("memory", "files", "threads", "children")
    }
    undisturbed = [[seconds[n] for n in quarter if n % CHECKPOINT_INTERVAL >= 10] for quarter in quarters]
    found["step"] = tuple(map(statistics.median, undisturbed))
    return {name: (first, last) for name, (first, last) in found.items()}


def measure(folder: Path, steps: int, flags: Sequence[str]) -> tuple[dict[str, tuple[float, float]], list[Sample]]:
    """Draw data, train, and compare. Raises RuntimeError where the run fails."""
    subprocess.run(
        [sys.executable, "tools/make_data.py", "--out", str(folder / "data"), "--train_scenes", "200",
         "--val_scenes", "20"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    paths, log = RunPaths(folder / "run"), folder / "log"
    with log.open("w") as output:
        command = [sys.executable, "launcher/sft.py", *run_flags(folder, steps), *flags]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            samples = watch(process, paths)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"the run ended with exit code {process.returncode}; it printed\n{log.read_text()[-3000:]}")
    return compare(samples, [float(line["seconds"]) for line in read_metrics(paths.metrics)]), samples


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="for data and the run, must not exist; default: a temporary one")
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    parser.add_argument("flags", nargs="*", help="of the launcher")
    options = parser.parse_args(argv)
    if options.steps < 200:
        parser.error(f"--steps {options.steps}: give 200 or more")
    if options.folder and options.folder.exists():
        parser.error(f"--folder {options.folder} exists already; give another one, or remove it")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.folder:
            folder.mkdir(parents=True)
        try:
            found, samples = measure(folder, options.steps, options.flags)
        except (RuntimeError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    table = Table(f"{options.steps:,} steps", "first quarter", "last quarter", "ratio", "at most")
    for name, (first, last) in found.items():
        digits = 4 if name == "step" else 0
        values = [f"{value:.{digits}f}" for value in (first, last, GROWTH[name](first))]
        table.add_row(name, *values[:2], f"{last / first:.3f}" if first else "", values[2])
    Console().print(table)
    grew = [name for name, (first, last) in found.items() if last > GROWTH[name](first)]
    print("grew: " + ", ".join(grew) if grew else "flat")
    if options.json:
        options.json.write_text(json.dumps({"quarters": found, "samples": [asdict(sample) for sample in samples]}))
    return int(bool(grew))


if __name__ == "__main__":
    sys.exit(main())
