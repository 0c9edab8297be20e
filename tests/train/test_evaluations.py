"""Checkpoints are evaluated by another command; training does not wait, and takes the scores when they are there."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from step_reports import step_report
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aki_megatron.config.evaluate_section import EvaluateConfig
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore
from aki_megatron.evaluate.run_report import RunRecord, write_report
from aki_megatron.supervise.evaluations import METRIC, SubmissionLog
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.callbacks import MetricsCallback, TensorBoardCallback
from aki_megatron.train.evaluations import EvaluationCallback, read_evaluations
from aki_megatron.train.wandb_callback import EVALUATION_STEP, WandbCallback

SCORES = (
    BenchmarkScore("POPE", {"POPE": 61.5}, {"POPE accuracy": 70.0}),
    BenchmarkScore("MMBench", {"MMB": None}, {"MMBench vanilla": 40.0}),
    BenchmarkScore("LLaVA-Bench", {"LLaVA": None}),
    BenchmarkScore("MME", {"MMEP": float("inf"), "MMEC": 200.0}),
)
EXPECTED = {"POPE": 61.5, "MMBench vanilla": 40.0, "MMEC": 200.0}

SCRIPT = """\
import json, os, sys
out = sys.argv[sys.argv.index("--out") + 1]
json.dump([sys.argv[1:], dict(os.environ)], open(out + "/called.json", "w"))
open(out + "/scores.json", "w").write({scores!r})
"""


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    """A command that scores at once, without an evaluation."""
    script = tmp_path / "evaluate.py"
    script.write_text(SCRIPT.format(scores=json.dumps([score.to_dict() for score in SCORES])))
    return (sys.executable, str(script))


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Run:
    """A run without training: the callbacks that take part, step by step."""

    def __init__(self, paths: RunPaths, config: EvaluateConfig, *others: Any) -> None:
        self.failures: list[str] = []
        self.evaluation = EvaluationCallback(config, paths, self.failures.append, poll_seconds=0)
        self.callbacks = [self.evaluation, MetricsCallback(paths.metrics), *others]
        self.evaluation.listeners = self.callbacks

    def start(self, step: int) -> None:
        for callback in self.callbacks:
            callback.on_start(step)

    def step(self, step: int) -> None:
        for callback in self.callbacks:
            callback.on_step(step, step_report())

    def end(self, step: int) -> None:
        for callback in self.callbacks:
            callback.on_end(step)


def evaluations(paths: RunPaths) -> list[tuple[int, int]]:
    """Return (step of the line, step of the scores) of metrics.jsonl."""
    return [(line["step"], each["step"]) for line in read_metrics(paths.metrics) for each in line.get(METRIC, ())]


class Points:
    """What wandb gets."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def test_scores_enter_metrics_trackers_and_report_with_the_step_that_they_are_of(
    paths: RunPaths, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    config = EvaluateConfig(
        interval=2,
        command=command,
        benchmarks=("POPE", "MME"),
        data=(Path("/b"),),
        per_benchmark=5,
        flags=("--threads", "9"),
    )
    wandb: Any = WandbCallback(paths.path, project="p", mode="offline", interval=1, config={})
    wandb.run = Points()
    wandb.on_start = wandb.on_end = lambda step: None
    run = Run(paths, config, TensorBoardCallback(paths.tensorboard, 1), wandb)
    run.start(0)
    for step in (1, 2):
        run.step(step)
    run.evaluation.submit(1)
    run.evaluation.submit(2)
    folder = paths.evaluations / "step_000002"
    assert [path.name for path in paths.evaluations.glob("step_*")] == ["step_000002"], "1 is no multiple of 2"
    wait_for((folder / "scores.json").exists)
    wait_for(lambda: run.evaluation._processes[0][2].poll() is not None)
    for step in (3, 4):
        run.step(step)
    run.end(4)

    arguments, environment = json.loads((folder / "called.json").read_text())
    checkpoint = str(paths.checkpoints.resolve() / "step_000002")
    assert arguments == [
        *("run", checkpoint, "--out", str(folder.resolve()), "--score", "--benchmarks", "POPE,MME", "--data", "/b"),
        *("--per_benchmark", "5", "--threads", "9"),
    ]
    assert not {
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "SLURM_PROCID",
        "OMPI_COMM_WORLD_RANK",
        "TORCHELASTIC_RUN_ID",
    } & set(environment), "the evaluation is none of the ranks that train"
    assert environment["SLURM_CONF"] == "/etc/slurm.conf" and run.failures == []

    assert evaluations(paths) == [(3, 2)]
    assert read_metrics(paths.metrics)[2][METRIC] == [{"step": 2, "folder": "step_000002", "scores": EXPECTED}]
    events = EventAccumulator(str(paths.tensorboard))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("evaluation/POPE")] == [(2, 61.5)]
    assert (
        3,
        {EVALUATION_STEP: 2, **{f"evaluation/{name}": value for name, value in EXPECTED.items()}},
    ) in wandb.run.logged
    assert [each.to_dict() for each in read_evaluations(paths)] == read_metrics(paths.metrics)[2][METRIC]
    paths.config.write_text("")
    record = RunRecord.load(
        paths.config, read_metrics(paths.metrics), (), [e.to_dict() for e in read_evaluations(paths)]
    )
    write_report(paths.report, "x", [record])
    assert "benchmarks after step" in paths.report.read_text() and ">61.5</td>" in paths.report.read_text()


def test_scores_are_taken_once_over_starts_and_again_where_their_line_is_gone(
    paths: RunPaths, command: tuple[str, ...]
) -> None:
    config = EvaluateConfig(interval=2, command=command)
    run = Run(paths, config)
    run.start(0)
    run.step(1)
    run.step(2)
    run.evaluation.submit(2)
    wait_for((paths.evaluations / "step_000002/scores.json").exists)
    run.step(3)
    run.step(4)
    assert evaluations(paths) == [(3, 2)]

    run = Run(paths, config)
    run.start(4)  # killed between the checkpoint of step 4 and its submission
    wait_for((paths.evaluations / "step_000004/scores.json").exists)
    run.step(5)
    assert evaluations(paths) == [(3, 2), (5, 4)]

    run = Run(paths, config)
    run.start(2)  # the checkpoint of step 4 is lost: steps 3 and 4 are trained again
    assert [each.step for each in SubmissionLog(paths).read()] == [2]
    run.step(3)
    run.step(4)
    run.evaluation.submit(4)
    wait_for((paths.evaluations / "step_000004_2/scores.json").exists)
    run.step(5)
    assert evaluations(paths) == [(3, 2), (5, 4)]
    assert read_metrics(paths.metrics)[4][METRIC][0]["folder"] == "step_000004_2"

    later = Run(paths, EvaluateConfig())
    later.start(5)
    later.step(6)
    later.evaluation.submit(6)
    assert evaluations(paths) == [(3, 2), (5, 4)] and len(SubmissionLog(paths).read()) == 2


def test_what_fails_is_reported_and_training_goes_on(paths: RunPaths, tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("print('sbatch: error: Batch job submission failed: Invalid account'); raise SystemExit(3)")
    run = Run(paths, EvaluateConfig(interval=1, command=(sys.executable, str(script))))
    run.start(0)
    run.evaluation.submit(1)
    wait_for(lambda: run.evaluation._processes[0][2].poll() is not None)
    (paths.evaluations / "step_000001/scores.json").write_text("[{}]")
    run.step(1)
    run.step(2)
    assert "the evaluation of step 1 ended with exit code 3: sbatch: error: Batch job submission" in run.failures[0]
    assert run.failures[1].startswith("the scores of step 1 are left out: ") and len(run.failures) == 2
    assert read_evaluations(paths) == [] and evaluations(paths) == []

    missing = Run(paths, EvaluateConfig(interval=1, command=("no such program",)))
    missing.evaluation.submit(2)
    assert missing.failures == [
        "the checkpoint of step 2 is not evaluated: [Errno 2] No such file or directory: 'no such program'"
    ]
    paths.evaluations.joinpath("step_000003").mkdir()
    blocked = Run(RunPaths(script), EvaluateConfig(interval=1))
    blocked.evaluation.submit(3)
    assert "the checkpoint of step 3 is not evaluated: " in blocked.failures[0]
