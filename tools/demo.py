"""Train a small AKI end to end on this machine, from drawing its data to a report a person can look at.

    make demo                       # the same, with the virtual environment made first
    .venv/bin/python tools/demo.py  # resumes where an earlier attempt stopped, or says that it is done

Every stage is one of the project's own commands, printed before it runs: copy them for runs of your own.
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
from rich.console import Console

DATA = Path("data/demo")
RUNS = Path("runs/demo")
PRETRAIN, SFT = RUNS / "pretrain", RUNS / "sft"
REPORT = RUNS / "report.html"

console = Console(highlight=False)


@dataclass(frozen=True)
class Stage:
    """A command and the file that exists once it has succeeded; None where the command itself knows what is done."""

    title: str
    command: Sequence[str]
    proof: Path | None


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stages(ranks: int) -> list[Stage]:
    """The demo, in order."""
    python, bin_folder = sys.executable, Path(sys.executable).parent
    deepspeed = [str(bin_folder / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    zero3 = ["--ds_config", "configs/zero3.json"]
    return [
        Stage("draw pictures, captions, questions, and train a tokenizer on them",
              [python, "tools/make_data.py", "--out", str(DATA)], None),
        Stage("train the small vision encoder, then freeze it",
              [python, "tools/train_encoder.py", "--data", str(DATA), "--out", str(DATA / "encoder")],
              None),
        Stage("pretrain on captions, causal attention, ZeRO-3",
              [*deepspeed, "launcher/pretrain.py", *zero3, "--config", "configs/demo/pretrain.yaml"],
              PRETRAIN / "DONE"),
        Stage("fine-tune on questions, modality-mutual attention, ZeRO-3",
              [*deepspeed, "launcher/sft.py", *zero3, "--config", "configs/demo/sft.yaml"],
              SFT / "DONE"),
        Stage("answer the held-out questions and write the report",
              [python, "tools/evaluate.py", str(SFT), "--with_run", str(PRETRAIN), "--report", str(REPORT)], REPORT),
    ]  # fmt: skip


def child_environment(ranks: int) -> dict[str, str]:
    """Share the cores among the ranks; without a GPU tell DeepSpeed so, or it warns at length."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    environment["PYTHONWARNINGS"] = "ignore::FutureWarning"
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def main() -> int:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=min(2, torch.cuda.device_count()) or 2,
                        help="processes that train together (default 2; 1 on a machine with one GPU)")  # fmt: skip
    arguments = parser.parse_args()
    environment = child_environment(arguments.ranks)
    started = time.monotonic()
    todo = stages(arguments.ranks)
    for number, stage in enumerate(todo, start=1):
        if stage.proof and stage.proof.exists():
            console.print(f"[green]done already[/green] {number}/{len(todo)}: {stage.title}")
            continue
        console.print(f"\n[bold blue]{number}/{len(todo)} {stage.title}[/bold blue]")
        console.print(f"[dim]$ {' '.join(stage.command)}[/dim]")
        began = time.monotonic()
        code = subprocess.run(stage.command, env=environment).returncode
        if code or (stage.proof and not stage.proof.exists()):
            console.print(f"[red]stage {number} stopped[/red] with exit code {code}; what it said is above.")
            console.print("`make demo` continues from here.")
            return code or 1
        console.print(f"[green]done[/green] in {time.monotonic() - began:.0f} s")
    console.print(f"\n[bold green]The demo is done[/bold green] ({time.monotonic() - started:.0f} s this time).")
    console.print(f"Open [bold]{REPORT}[/bold]")
    console.print(f"To do it again from the start: rm -r {RUNS} {DATA}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
