"""Faults beside training: trackers, terminals, disks and loader workers that end, in real runs."""

import os
import pty
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launchers import launcher_command
from small_demo import ROOT, TIMEOUT_SECONDS, DemoWorkspace

from aki_megatron.supervise.attempts import newest_step, read_attempts
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.sample_audit import read_sample_audit

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

BAD_INPUT_SECONDS = 120
"""Imports included, on a busy machine; a hang lasts for ever."""


def flags(demo: DemoWorkspace, run: Path, *, steps: int = 400, wandb: str = "offline") -> list[str]:
    data = demo.folder / "data"
    return [
        "--config", str(ROOT / "configs/demo/sft.yaml"), "--data.root", str(data), "--data.tokenizer",
        str(data / "tokenizer"), "--run.dir", str(run), "--train.steps", str(steps), "--optimizer.warmup_steps", "2",
        "--train.global_batch_size", "4", "--train.micro_batch_size", "1", "--checkpoint.interval", "1000",
        "--log.interval", "1", "--log.tensorboard", "false", "--data.num_workers", "2", "--init.weights", "null",
        "--parallel.zero_stage", "0", "--model.decoder.num_layers", "1", "--log.wandb", wandb,
    ]  # fmt: skip


def start(demo: DemoWorkspace, arguments: list[str], **options: object) -> subprocess.Popen[str]:
    command = demo.command("launcher/sft.py", *arguments)
    return subprocess.Popen(command, cwd=ROOT, env=demo.environment, text=True, start_new_session=True, **options)  # type: ignore[call-overload]


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while len(read_metrics(RunPaths(run).metrics)) < steps:
        assert process.poll() is None and time.monotonic() < end, "ended, or never began"
        time.sleep(0.05)


def test_sigterm_to_every_process_of_a_job_with_wandb_is_a_stop(demo: DemoWorkspace) -> None:
    """Slurm sends it to the loader's workers and to wandb's own process, too; run.dir looks like markup."""
    run = demo.folder / "[bold]preempted[/INST]"
    process = start(demo, flags(demo, run), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_steps(run, 3, process)
    for pid in [*children(process.pid), process.pid]:
        os.kill(pid, signal.SIGTERM)
    out, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, errors
    paths = RunPaths(run)
    (attempt,) = read_attempts(paths)
    assert attempt.end == "stopped" and attempt.step == newest_step(paths) == len(read_metrics(paths.metrics))
    assert [event["kind"] for event in read_events(paths)].count("output_failed") <= 1
    assert "[/INST]" not in errors and "stopped after step" in out
    steps = attempt.step + 2
    demo.run("launcher/sft.py", *flags(demo, run), "--train.steps", str(steps), "--allow_change", "train.steps")
    assert [line["step"] for line in read_metrics(paths.metrics)] == list(range(1, steps + 1))
    assert len(read_sample_audit(run)) == steps and paths.done.exists()


def test_a_reader_of_the_output_that_ends_does_not_end_the_run(demo: DemoWorkspace) -> None:
    run = demo.folder / "closed_pipe"
    process = start(demo, flags(demo, run, steps=6, wandb="disabled"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=TIMEOUT_SECONDS) == 0
    paths = RunPaths(run)
    assert paths.done.exists() and paths.report.exists()
    (event,) = read_events(paths)
    assert event["kind"] == "output_failed" and "BrokenPipeError" in event["text"]


def test_a_terminal_that_closes_does_not_end_the_run(demo: DemoWorkspace) -> None:
    """Its SIGHUP is ignored; what is printed afterwards fails, which is recorded once."""
    run = demo.folder / "closed_terminal"
    terminal, far_end = pty.openpty()
    command = ["setsid", "--ctty", *demo.command("launcher/sft.py", *flags(demo, run, steps=40, wandb="disabled"))]
    process = subprocess.Popen(command, cwd=ROOT, env=demo.environment, stdin=far_end, stdout=far_end, stderr=far_end)
    os.close(far_end)
    wait_for_steps(run, 2, process)
    os.close(terminal)
    assert process.wait(timeout=TIMEOUT_SECONDS) == 0
    paths = RunPaths(run)
    assert paths.done.exists() and len(read_metrics(paths.metrics)) == 40
    (event,) = read_events(paths)
    assert event["kind"] == "output_failed" and "nothing can be printed any more" in event["text"]


def test_checkpoints_that_can_never_be_written_end_the_run_early(demo: DemoWorkspace) -> None:
    run = demo.folder / "no_checkpoints"
    run.mkdir()
    (run / "checkpoints").write_text("a file where a folder should be")
    result = demo.run("launcher/sft.py", *flags(demo, run, wandb="disabled"), "--checkpoint.interval", "2", ok=False)
    assert result.returncode != 0 and "no checkpoint at step 2, training continues" in result.stdout
    assert "3 checkpoints in a row could not be saved" in result.stderr and result.stderr.count("error:") == 1
    assert len(read_metrics(RunPaths(run).metrics)) <= 9


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_bad_data_with_workers_ends_the_process(
    demo: DemoWorkspace, tmp_path: Path, launcher: str, num_workers: int
) -> None:
    """A worker meets images that cannot be read; a single process used to hang at its exit."""
    data = tmp_path / "data"
    shutil.copytree(demo.folder / "data/VQA", data / "VQA")
    for image in sorted((data / "VQA/train2014").iterdir())[10:]:
        image.write_bytes(b"no image")
    arguments = [
        *flags(demo, tmp_path / "run", wandb="disabled"), "--data.root", str(data), "--data.sources",
        "[{name: vqav2, weight: 1.0}]", "--data.num_workers", str(num_workers),
    ]  # fmt: skip
    script = str(ROOT / "launcher/sft.py")
    prefix = [] if launcher == "python" else launcher_command(launcher, 1)
    command = [*prefix, script] if prefix else demo.command("launcher/sft.py")
    result = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=demo.environment, capture_output=True, text=True,
        timeout=BAD_INPUT_SECONDS, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("could not be used") <= 1 and result.stderr.count("error") >= 1, result.stderr
