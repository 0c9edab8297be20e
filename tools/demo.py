"""Train a small AKI end to end on this machine, from writing its data to an HTML report.

    make demo                       # the same, after creating the virtual environment
    .venv/bin/python tools/demo.py  # continues where an earlier attempt stopped

Every step is one of the project's own commands, printed before it runs: copy them for runs of your own.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from aki_megatron.console import Console, styled

DATA = Path("data/demo")
RUNS = Path("runs/demo")
PRETRAIN, SFT = RUNS / "pretrain", RUNS / "sft"
REPORT = RUNS / "report.html"

console = Console()


@dataclass(frozen=True)
class Step:
    """A command and the file that exists once it has succeeded; None where the command itself skips finished work."""

    title: str
    command: Sequence[str]
    output: Path | None


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def demo_steps(ranks: int) -> list[Step]:
    """Return the steps of the demo in order."""
    python, bin_folder = sys.executable, Path(sys.executable).parent
    deepspeed = [str(bin_folder / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    zero3 = ["--ds_config", "configs/zero3.json"]
    return [
        Step("write images, captions and questions, and train a tokenizer",
             [python, "tools/make_data.py", "--out", str(DATA)], None),
        Step("train the small vision encoder",
             [python, "tools/train_encoder.py", "--data", str(DATA), "--out", str(DATA / "encoder")], None),
        Step("pretrain on captions, causal attention, ZeRO-3",
             [*deepspeed, "launcher/pretrain.py", *zero3, "--config", "configs/demo/pretrain.yaml"],
             PRETRAIN / "DONE"),
        Step("fine-tune on questions, modality-mutual attention, ZeRO-3",
             [*deepspeed, "launcher/sft.py", *zero3, "--config", "configs/demo/sft.yaml"],
             SFT / "DONE"),
        Step("answer the val questions and write the report",
             [python, "tools/evaluate.py", str(SFT), "--with_run", str(PRETRAIN), "--report", str(REPORT)], REPORT),
    ]  # fmt: skip


def child_environment(ranks: int) -> dict[str, str]:
    """Divide the cores among the ranks; without a GPU tell DeepSpeed so, else it prints many warnings."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    environment["PYTHONWARNINGS"] = "ignore::FutureWarning"
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def main() -> int:
    """Run the steps that are not done yet; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=min(2, torch.cuda.device_count()) or 2,
                        help="training processes (default 2; 1 on a machine with one GPU)")  # fmt: skip
    arguments = parser.parse_args()
    environment = child_environment(arguments.ranks)
    demo_start = time.monotonic()
    steps = demo_steps(arguments.ranks)
    for number, step in enumerate(steps, start=1):
        if step.output and step.output.exists():
            console.print(styled(("done already", "green"), f" {number}/{len(steps)}: {step.title}"))
            continue
        console.print(f"\n{number}/{len(steps)} {step.title}", style="bold blue")
        console.print(f"$ {' '.join(step.command)}", style="dim")
        step_start = time.monotonic()
        code = subprocess.run(step.command, env=environment).returncode
        if code or (step.output and not step.output.exists()):
            console.print(styled((f"step {number} failed", "red"), f" with exit code {code}; its messages are above."))
            console.print("`make demo` continues from here.")
            return code or 1
        console.print(styled(("done", "green"), f" in {time.monotonic() - step_start:.0f} s"))
    console.print(styled(("\nThe demo is done", "bold green"), f" in {time.monotonic() - demo_start:.0f} s."))
    console.print(styled("Open ", (str(REPORT), "bold")))
    console.print(f"To repeat it from the start: rm -r {RUNS} {DATA}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
