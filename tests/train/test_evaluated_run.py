"""A run whose checkpoints another command evaluates: its numbers stay, the scores come into its metrics and report."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401  # here, and not in every forked process again
import pytest
import torch
from forked import exit_code, fork

import aki_megatron.train.main  # noqa: F401
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.synthetic.demo_tokenizer import write_tokenizer
from aki_megatron.train import build_callbacks
from aki_megatron.train.cli import run_launcher
from aki_megatron.train.evaluations import EvaluationCallback

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """\
import sys
arguments = sys.argv[1:]
step = int(arguments[1][-6:])
if step == 1:
    sys.exit("no such account")
open(arguments[arguments.index("--out") + 1] + "/scores.json", "w").write({scores!r} % step)
"""


class WaitingCallback(EvaluationCallback):
    """Let each evaluation end before the next step, which a real run never does."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, poll_seconds=0)

    def submit(self, step: int) -> None:
        super().submit(step)
        for *_, process in self._processes:
            process.wait()


def write_data(folder: Path) -> None:
    """Write a few conversations of text, and a tokenizer."""
    write_tokenizer(folder / "tokenizer")
    records = []
    for number in range(12):
        question = {"from": "human", "value": f"What is {number}?"}
        records.append(
            {"id": str(number), "conversations": [question, {"from": "gpt", "value": "red " * (1 + number)}]}
        )
    (folder / "chat.json").write_text(json.dumps(records))


def train(folder: Path, run: str, *flags: str) -> RunPaths:
    """Train three steps of one small layer in a forked process, which need not import torch again."""
    paths = RunPaths(folder / run)
    named = {
        "--config": str(ROOT / "configs/demo/own.yaml"), "--run.dir": str(paths.path), "--init.weights": "null",
        "--data.root": str(folder), "--data.tokenizer": str(folder / "tokenizer"), "--data.num_workers": "0",
        "--data.sources": "[{name: chat, format: llava, path: chat.json}]", "--model.decoder.num_layers": "1",
        "--train.steps": "3", "--optimizer.warmup_steps": "1", "--optimizer.eps": "1e-5",
        "--train.global_batch_size": "4", "--train.micro_batch_size": "4", "--checkpoint.async_save": "false",
        "--checkpoint.interval": "1", "--checkpoint.keep_every": "1", "--log.tensorboard": "false",
        "--log.wandb": "disabled", "--validation.interval": "0",
    }  # fmt: skip

    def run_it() -> bool:
        torch.set_num_threads(1)
        return run_launcher("sft", [*(part for pair in named.items() for part in pair), *flags], {}) == 0

    assert exit_code(fork(run_it)) == 0
    return paths


def test_training_is_the_same_with_evaluations_and_takes_their_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_callbacks, "EvaluationCallback", WaitingCallback)
    write_data(tmp_path)
    script = tmp_path / "evaluate.py"
    scores = json.dumps([BenchmarkScore("POPE", {"POPE": 77.0}).to_dict()]).replace("77.0", "%d.5")
    script.write_text(SCRIPT.format(scores=scores))
    command = f"[{sys.executable}, {script}]"
    evaluated = train(tmp_path, "evaluated", "--evaluate.interval", "1", "--evaluate.command", command)
    plain = train(tmp_path, "plain")

    lines, expected = read_metrics(evaluated.metrics), read_metrics(plain.metrics)
    for name in ("loss", "grad_norm", "lr", "supervised_tokens"):
        assert [line[name] for line in lines] == [line[name] for line in expected] and len(lines) == 3
    assert [line.get("evaluations") for line in lines] == [
        None, None, [{"step": 2, "folder": "step_000002", "scores": {"POPE": 2.5}}],
    ]  # fmt: skip
    assert not plain.evaluations.exists() and not any("evaluations" in line for line in expected)
    report = evaluated.report.read_text()
    assert "benchmarks after step" in report and ">2.5</td>" in report and ">3.5</td>" in report
    assert "evaluation of step 2: POPE 2.5" in capfd.readouterr().out
    (event,) = read_events(evaluated)
    assert event["kind"] == "output_failed" and "step 1 ended with exit code 1: no such account" in event["text"]
