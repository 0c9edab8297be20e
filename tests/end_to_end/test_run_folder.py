"""What a user does to a run folder: two starts, Ctrl-C, files that are away or damaged. No history is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from small_demo import ROOT, TIMEOUT_SECONDS, DemoWorkspace

from aki_megatron.supervise.attempts import read_attempts
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.exit_codes import INTERRUPTED, USER_ERROR
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_lock import read_holder
from aki_megatron.supervise.run_paths import RunPaths

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STEPS = 6

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(demo: DemoWorkspace) -> Iterator[Start]:
    """``start(run, *flags, world=..., port=...)``: a small run without DeepSpeed, whose engine takes long to start."""
    processes: list[subprocess.Popen[str]] = []

    def launch(run: str, *flags: str, rank: int = 0, world: int = 1, port: int = 0) -> subprocess.Popen[str]:
        command = [
            *demo.sft_flags(run, steps=STEPS), "--init.weights", "null", "--parallel.zero_stage", "0",
            "--model.decoder.num_layers", "1", "--log.tensorboard", "false", "--checkpoint.interval", "2",
            "--train.global_batch_size", "2", "--train.micro_batch_size", "1", "--data.num_workers", "1", *flags,
        ]  # fmt: skip
        # the last of a flag counts
        names = {name: index for index, name in enumerate(command) if name.startswith("--")}
        command = [part for name, index in names.items() for part in (name, command[index + 1])]
        variables = {} if world == 1 else {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launcher/sft.py"), *command],
            cwd=ROOT, env=demo.environment | variables, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        processes.append(process)
        return process

    yield launch
    for process in processes:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait; return exit code, stdout and stderr."""
    out, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert "Traceback" not in errors + out, errors
    return process.returncode, out, errors


def refused(process: subprocess.Popen[str]) -> str:
    code, _, errors = ended(process)
    assert code == USER_ERROR and errors.startswith("error: "), errors
    return errors


def wait_until(true: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def steps_done(paths: RunPaths) -> int:
    return len(read_metrics(paths.metrics))


@pytest.fixture(scope="module")
def finished(demo: DemoWorkspace) -> RunPaths:
    """A run of 6 steps that is done."""
    flags = [
        *demo.sft_flags("folder_finished", steps=STEPS), "--init.weights", "null", "--parallel.zero_stage", "0",
        "--model.decoder.num_layers", "1", "--log.tensorboard", "false", "--data.num_workers", "1",
    ]  # fmt: skip
    flags = [flag if flag != "8" else "2" for flag in flags]
    flags = ["1" if flags[index - 1] == "--train.micro_batch_size" else flag for index, flag in enumerate(flags)]
    flags = ["2" if flags[index - 1] == "--checkpoint.interval" else flag for index, flag in enumerate(flags)]
    demo.run("launcher/sft.py", *flags)
    return RunPaths(demo.folder / "folder_finished")


@pytest.fixture
def unfinished(demo: DemoWorkspace, finished: RunPaths, request: pytest.FixtureRequest) -> RunPaths:
    """A copy of it as if it had been killed after step 5, in a folder of the test."""
    paths = RunPaths(demo.folder / f"folder_{request.node.name}")
    shutil.copytree(finished.path, paths.path)
    paths.done.unlink()
    shutil.rmtree(paths.checkpoints / "step_000006")
    (paths.checkpoints / "latest").write_text("step_000004\n")
    paths.saved.write_text("4\n")
    paths.metrics.write_text("".join(paths.metrics.read_text().splitlines(keepends=True)[:5]))
    return paths


def test_checkpoints_that_are_away_are_missed(start: Start, unfinished: RunPaths) -> None:
    metrics = unfinished.metrics.read_text()
    unfinished.checkpoints.rename(unfinished.path / "elsewhere")
    errors = refused(start(unfinished.path.name))
    assert "had saved step 4" in errors and str(unfinished.checkpoints) in errors and "Bring the folder back" in errors
    assert unfinished.metrics.read_text() == metrics
    (unfinished.path / "elsewhere").rename(unfinished.checkpoints)
    code, out, errors = ended(start(unfinished.path.name))
    assert code == 0 and "resuming after step 4" in out, errors
    assert [line["step"] for line in read_metrics(unfinished.metrics)] == list(range(1, STEPS + 1))


def test_the_config_of_the_checkpoint_counts_too(start: Start, unfinished: RunPaths) -> None:
    config = unfinished.config.read_text()
    unfinished.config.unlink()
    errors = refused(start(unfinished.path.name, "--optimizer.lr", "0.01"))
    assert "step_000004 holds another run" in errors and "optimizer.lr was" in errors
    code, out, errors = ended(start(unfinished.path.name))
    assert code == 0 and "resuming after step 4" in out, errors
    assert unfinished.config.read_text() == config.replace("folder_finished", unfinished.path.name)


def test_an_allowed_change_holds_for_older_checkpoints(start: Start, unfinished: RunPaths) -> None:
    flags = ("--optimizer.lr", "0.002")
    assert "--allow_change optimizer.lr" in refused(start(unfinished.path.name, *flags))
    first = start(unfinished.path.name, *flags, "--allow_change", "optimizer.lr", "--train.steps", "6")
    assert ended(first)[0] == 0
    # only the checkpoint from before the change is left
    unfinished.done.unlink()
    shutil.rmtree(unfinished.checkpoints / "step_000006")
    code, out, errors = ended(start(unfinished.path.name, *flags))
    assert code == 0 and "resuming after step 4" in out, errors
    assert [event["kind"] for event in read_events(unfinished)].count("change") >= 1
    more = start(unfinished.path.name, *flags, "--train.steps", "8", "--allow_change", "train.steps")
    code, out, errors = ended(more)
    assert code == 0 and "done after 8 steps" in out, errors


def test_a_start_that_failed_before_its_first_step_locks_nothing(start: Start, demo: DemoWorkspace) -> None:
    run = "folder_failed_first"
    (demo.folder / "empty").mkdir()
    errors = ended(start(run, "--init.weights", str(demo.folder / "empty")))[2]
    paths = RunPaths(demo.folder / run)
    assert "No complete checkpoint" in errors and paths.config.exists()
    process = start(run, "--optimizer.lr", "0.0007")
    wait_until(lambda: steps_done(paths) > 0, process)
    assert "lr: 0.0007" in paths.config.read_text() and "changed" not in paths.config.read_text()
    process.send_signal(signal.SIGINT)
    code, out, _ = ended(process)
    assert code == INTERRUPTED and "interrupted after step" in out


def test_two_starts_in_one_folder(start: Start, demo: DemoWorkspace) -> None:
    run = "folder_two"
    paths = RunPaths(demo.folder / run)
    first = start(run, "--train.steps", "100000", "--checkpoint.interval", "100000")
    wait_until(lambda: steps_done(paths) > 1, first)
    holder = read_holder(paths)
    assert holder is not None and holder.pid == first.pid
    second = refused(start(run, "--train.steps", "100000", "--checkpoint.interval", "100000"))
    assert f"process {first.pid} on {holder.host}" in second and str(paths.running) in second
    # of two ranks: each refuses by itself, and leaves no file of its own
    pair = [start(run, "--train.steps", "100000", rank=rank, world=2, port=29751) for rank in (0, 1)]
    for process in pair:
        code, _, errors = ended(process)
        assert code == USER_ERROR and f"process {first.pid}" in errors
    before = steps_done(paths)
    wait_until(lambda: steps_done(paths) > before + 2, first)

    first.send_signal(signal.SIGINT)
    code, out, errors = ended(first)
    assert code == INTERRUPTED and errors == "" and "begins again: no checkpoint was saved" in out
    (attempt,) = read_attempts(paths)
    assert attempt.end == "interrupted" and attempt.step in (steps_done(paths), steps_done(paths) - 1)
    assert not paths.running.exists()
    assert all(line["step"] for line in map(json.loads, paths.metrics.read_text().splitlines()))

    killed = start(run, "--train.steps", "100000", "--checkpoint.interval", "100000")
    wait_until(paths.running.exists, killed)
    killed.kill()
    killed.communicate()
    assert paths.running.exists()
    third = start(run, "--train.steps", "100000", "--checkpoint.interval", "100000")  # the holder is dead
    wait_until(lambda: len(read_attempts(paths)) == 2 and steps_done(paths) > 2, third)


def test_the_second_start_of_two_ranks_does_not_end_the_first(start: Start, demo: DemoWorkspace) -> None:
    run, flags = "folder_two_ranks", ("--train.steps", "100000", "--checkpoint.interval", "100000")
    paths = RunPaths(demo.folder / run)
    first = [start(run, *flags, rank=rank, world=2, port=29752) for rank in (0, 1)]
    wait_until(lambda: steps_done(paths) > 1, first[0])
    second = [start(run, *flags, rank=rank, world=2, port=port) for rank, port in ((0, 29753), (1, 29752))]
    for process in second:  # the second rank has the port of the first run, so that only its process file tells
        assert ended(process)[0] == USER_ERROR
    before = steps_done(paths)
    wait_until(lambda: steps_done(paths) > before + 5, first[0])
    assert all(process.poll() is None for process in first)
    paths.stop.touch()
    assert [ended(process)[0] for process in first] == [0, 0]
    assert read_attempts(paths)[-1].end == "stopped"
    paths.stop.unlink()

    third = [start(run, *flags, rank=rank, world=2, port=29754) for rank in (0, 1)]
    before = steps_done(paths)
    wait_until(lambda: steps_done(paths) > before, third[0])
    for process in third:  # Ctrl-C
        process.send_signal(signal.SIGINT)
    assert [ended(process)[0] for process in third] == [INTERRUPTED, INTERRUPTED]
    assert read_attempts(paths)[-1].end == "interrupted"


def test_a_run_folder_that_is_removed_ends_the_run(start: Start, demo: DemoWorkspace) -> None:
    paths = RunPaths(demo.folder / "folder_removed")
    process = start(paths.path.name, "--train.steps", "100000", "--checkpoint.interval", "100000")
    wait_until(lambda: steps_done(paths) > 1, process)
    shutil.rmtree(paths.path)
    code, _, errors = ended(process)
    assert code == USER_ERROR and f"the run folder {paths.path} was removed while the run trained in it" in errors
    assert errors.count("error") == 1


def test_damaged_files_do_not_keep_a_run_from_going_on(start: Start, unfinished: RunPaths) -> None:
    bad = b'{"step": 3, "loss"\xff\n'
    for path in (unfinished.metrics, unfinished.sample_audit / "replica_0.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:2], bad, *lines[3:]]))
    for path in (unfinished.attempts, unfinished.events):
        with path.open("ab") as file:
            file.write(b"\x00\x00\n[1]\n{}\n")
    (unfinished.checkpoints / "latest").write_bytes(b"\xff\xfe")
    unfinished.running.write_text("{")
    code, out, errors = ended(start(unfinished.path.name))
    assert code == 0 and "resuming after step 4" in out, errors
    assert [line["step"] for line in read_metrics(unfinished.metrics)] == [1, 2, 4, 5, 6]
    assert unfinished.metrics.with_name("metrics.jsonl.damaged").read_bytes() == bad
    assert os.listdir(unfinished.path / "sample_audit") != []
