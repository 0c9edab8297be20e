"""A run whose checkpoints another command evaluates: its numbers stay, the scores come into its metrics and report."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from forked import exit_code, fork
from small_demo import ROOT, DemoWorkspace

from aki_megatron.evaluate.benchmarks.score import BenchmarkScore
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.cli import run_launcher

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

SCRIPT = """\
import sys
arguments = sys.argv[1:]
step = int(arguments[1][-6:])
if step == 1:
    sys.exit("no such account")
open(arguments[arguments.index("--out") + 1] + "/scores.json", "w").write({scores!r} % step)
"""


def train(demo: DemoWorkspace, run: str, steps: int, *flags: str) -> RunPaths:
    """Train a run of one small layer in a forked process, which need not import torch again."""
    paths = RunPaths(demo.folder / run)
    named = {
        "--config": str(ROOT / "configs/demo/sft.yaml"), "--run.dir": str(paths.path), "--init.weights": "null",
        "--train.steps": str(steps), "--optimizer.warmup_steps": "1", "--parallel.zero_stage": "0",
        "--model.decoder.num_layers": "1", "--train.global_batch_size": "4", "--train.micro_batch_size": "4",
        "--checkpoint.interval": "1", "--checkpoint.keep_every": "1", "--data.num_workers": "1",
        "--log.tensorboard": "false", "--optimizer.eps": "1e-5", "--allow_change": "train.steps",
    }  # fmt: skip
    argv = [*demo.data_flags(), *(part for pair in named.items() for part in pair), *flags]

    def run_it() -> bool:
        with (demo.folder / f"{run}.out").open("a") as output:
            os.dup2(output.fileno(), 1)
            return run_launcher("sft", argv, {}) == 0

    assert exit_code(fork(run_it)) == 0, (demo.folder / f"{run}.out").read_text()
    return paths


def test_training_is_the_same_with_evaluations_and_takes_their_scores(demo: DemoWorkspace, tmp_path: Path) -> None:
    script = tmp_path / "evaluate.py"
    scores = json.dumps([BenchmarkScore("POPE", {"POPE": 77.0}).to_dict()]).replace("77.0", "%d.5")
    script.write_text(SCRIPT.format(scores=scores))
    flags = ("--evaluate.interval", "1", "--evaluate.command", f"[{sys.executable}, {script}]")
    evaluated = train(demo, "evaluated", 2, *flags)
    end = time.monotonic() + 60
    while not (evaluated.evaluations / "step_000002/scores.json").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    train(demo, "evaluated", 3, *flags)
    plain = train(demo, "not_evaluated", 2)
    train(demo, "not_evaluated", 3)

    lines, expected = read_metrics(evaluated.metrics), read_metrics(plain.metrics)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected] and len(lines) == 3
    assert lines[2]["evaluations"] == [{"step": 2, "folder": "step_000002", "scores": {"POPE": 2.5}}]
    assert not plain.evaluations.exists() and not any("evaluations" in line for line in expected)
    report = evaluated.report.read_text()
    assert "benchmarks after step" in report and ">2.5</td>" in report
    assert "evaluation of step 2: POPE 2.5" in (demo.folder / "evaluated.out").read_text()
    log = (evaluated.evaluations / "step_000001/evaluate.log").read_text()
    assert log == "no such account\n" and not (evaluated.evaluations / "step_000001/scores.json").exists()
    assert all(event["kind"] in ("change", "output_failed") for event in read_events(evaluated))
