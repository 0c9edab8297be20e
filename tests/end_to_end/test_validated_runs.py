"""Runs that validate while they train: what is trained, the record, the best checkpoint, stops, resumed runs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from small_demo import ROOT, TIMEOUT_SECONDS, DemoWorkspace

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.initial_weights import load_weights
from aki_megatron.config.save import load_saved
from aki_megatron.model.stage import build_model
from aki_megatron.supervise.heartbeat import Heartbeat
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.status import format_status, read_status
from aki_megatron.supervise.validations import read_validations

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STEPS = 4


def command(demo: DemoWorkspace, run: str, *flags: str) -> list[str]:
    """A run of one small layer without DeepSpeed, whose engine takes long to start."""
    named = {
        "--config": str(ROOT / "configs/demo/sft.yaml"), "--run.dir": str(demo.folder / run), "--init.weights": "null",
        "--train.steps": str(STEPS), "--optimizer.warmup_steps": "1", "--parallel.zero_stage": "0",
        "--model.decoder.num_layers": "1", "--train.global_batch_size": "4", "--train.micro_batch_size": "1",
        "--checkpoint.interval": "3", "--checkpoint.keep_last": "1", "--data.num_workers": "1", "--log.interval": "1",
        "--log.tensorboard": "false", "--optimizer.eps": "1e-5",
    }  # fmt: skip
    named |= dict(zip(flags[::2], flags[1::2], strict=True))
    return ["launcher/sft.py", *demo.data_flags(), *(part for pair in named.items() for part in pair)]


VALIDATION = (
    "--validation.interval", "1", "--validation.samples", "5", "--validation.generate", "2",
    "--validation.max_new_tokens", "3",
)  # fmt: skip


def losses(paths: RunPaths) -> list[float]:
    return [line["loss"] for line in read_metrics(paths.metrics)]


def record(paths: RunPaths) -> list[dict[str, object]]:
    """Return the lines of validation.jsonl without the time that the validations took."""
    return [{**line, "seconds": 0} for line in read_validations(paths.validation)]


def weights(checkpoint: RunPaths) -> dict[str, torch.Tensor]:
    config = load_saved(checkpoint.config)
    model = build_model(config.model, attention=config.attention)
    load_weights(model, files.find_checkpoint(checkpoint.path))
    return dict(model.named_parameters())


def test_training_is_bit_equal_with_validation_also_when_resumed(demo: DemoWorkspace) -> None:
    without, with_validation = RunPaths(demo.folder / "not_validated"), RunPaths(demo.folder / "validated")
    demo.run(*command(demo, without.path.name))
    printed = demo.run(*command(demo, with_validation.path.name, *VALIDATION)).stdout
    assert printed.count("validation after step") == STEPS and "accuracy" in printed
    assert losses(with_validation) == losses(without)
    trained, expected = weights(with_validation), weights(without)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    lines = record(with_validation)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    best = min(lines, key=lambda line: line["loss"])
    found = files.best_checkpoint(with_validation.checkpoints)
    assert found is not None and files.step_of(found) == best["step"]
    kept = {files.step_of(path) for path in files.list_checkpoints(with_validation.checkpoints)}
    assert kept == {STEPS, best["step"]}
    shown = dict(format_status(read_status(with_validation.path, time.time())))
    assert shown["best"] == f"{found.name} (validation loss {best['loss']:.4f})"
    assert shown["validation"].startswith("step 4: loss")
    report = with_validation.report.read_text()
    assert "last validation loss" in report and "of 2</td>" in report

    # as after a kill: the last checkpoint is away, and the run goes on from an earlier one
    resumed = RunPaths(demo.folder / "validated_resumed")
    flags = (*VALIDATION, "--checkpoint.keep_last", "9")
    demo.run(*command(demo, resumed.path.name, *flags, "--validation.generate", "0"))
    for step in (3, 4):
        shutil.rmtree(resumed.checkpoints / files.checkpoint_name(step))
    resumed.done.unlink()
    demo.run(*command(demo, resumed.path.name, *flags))
    assert losses(resumed) == losses(without)
    assert record(resumed)[2:] == lines[2:], "step 2 was validated before the checkpoint of step 2"
    assert files.best_checkpoint(resumed.checkpoints) == resumed.checkpoints / found.name


def start(demo: DemoWorkspace, *arguments: str, port: int, rank: int, ranks: int) -> subprocess.Popen[str]:
    variables = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        cwd=ROOT, env=demo.environment | variables, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(true: Callable[[], bool], ranks: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not true():
        assert all(process.poll() is None for process in ranks) and time.monotonic() < end, "ended, or never began"
        time.sleep(0.02)


def children_of(pid: int) -> set[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return {int(child) for child in file.read().split()}


def test_a_stop_during_a_validation_comes_at_once_and_the_next_start_may_validate_otherwise(
    demo: DemoWorkspace,
) -> None:
    paths = RunPaths(demo.folder / "stopped_validating")
    slow = ("--validation.interval", "2", "--validation.samples", "0", "--validation.split", "train")
    sizes = ("--train.global_batch_size", "2", "--parallel.pipeline", "2", "--model.decoder.num_layers", "2")
    ranks = [
        start(demo, *command(demo, paths.path.name, *slow, *sizes), port=29761, rank=rank, ranks=2) for rank in (0, 1)
    ]
    try:
        wait_until(lambda: len(read_metrics(paths.metrics)) == 2, ranks)

        def is_validating() -> bool:
            beat = Heartbeat.read(paths.heartbeat(1))
            return beat is not None and beat.phase.startswith("validat")

        wait_until(is_validating, ranks)
        ranks[1].send_signal(signal.SIGUSR1)
        began = time.monotonic()
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert "stopped after step 2 (another rank was asked to stop)" in outputs[0][0], outputs
    assert time.monotonic() - began < 120 and read_validations(paths.validation) == []
    latest = files.latest_checkpoint(paths.checkpoints)
    assert latest is not None and files.step_of(latest) == 2

    layout = ("--train.global_batch_size", "2", "--model.decoder.num_layers", "2")  # one process, other settings
    printed = demo.run(*command(demo, paths.path.name, *VALIDATION, "--validation.interval", "2", *layout)).stdout
    assert printed.index("resuming after step 2") < printed.index("validation after step 2") < printed.index("step 3/4")
    assert [line["step"] for line in read_validations(paths.validation)] == [2, 4]


def test_workers_of_a_validation_end_with_it(demo: DemoWorkspace) -> None:
    paths = RunPaths(demo.folder / "workers")
    flags = (
        *VALIDATION,
        "--train.steps",
        "100000",
        "--checkpoint.interval",
        "100000",
        "--validation.keep_best",
        "false",
    )
    process = start(demo, *command(demo, paths.path.name, *flags), port=29762, rank=0, ranks=1)
    try:
        wait_until(lambda: len(read_validations(paths.validation)) > 4, [process])
        assert len(children_of(process.pid)) <= 2, "the worker of training, and at most one of validation"
        assert files.latest_checkpoint(paths.checkpoints) is None, "keep_best is false"
        os.kill(process.pid, signal.SIGUSR1)
        assert "stopped after step" in process.communicate(timeout=TIMEOUT_SECONDS)[0]
    finally:
        process.kill()
