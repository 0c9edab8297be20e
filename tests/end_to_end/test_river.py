"""The real launchers on real files: train, kill, resume, answer, report."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_demo import ROOT, TIMEOUT_SECONDS, World

pytestmark = pytest.mark.end_to_end

STEPS = 14
DEEPSPEED = ("deepspeed", "--num_gpus", "2", "--master_port")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def deepspeed_sft(world: World, run: str, port: int) -> list[str]:
    launcher = str(ROOT / "launcher/sft.py")
    zero3 = ["--ds_config", str(ROOT / "configs/zero3.json")]
    return [*DEEPSPEED, str(port), launcher, *zero3, *world.sft_flags(run, steps=STEPS)]


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Path:
    world.run(*deepspeed_sft(world, "undisturbed", 29611))
    return world.folder / "undisturbed"


def test_the_run_folder_holds_what_the_readme_says(undisturbed: Path) -> None:
    assert [line["step"] for line in metrics(undisturbed)] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (undisturbed / "checkpoints").glob("step_*")) == ["step_000012", "step_000014"]
    for name in ("config.yaml", "report.html", "DONE", "logs/rank_0.log", "logs/rank_1.log"):
        assert (undisturbed / name).stat().st_size > 0, name
    assert all(line["images"] == 8 and line["supervised_tokens"] > 8 for line in metrics(undisturbed))


def test_a_killed_run_ends_with_the_losses_of_an_undisturbed_one(world: World, undisturbed: Path) -> None:
    run = world.folder / "killed"
    command = deepspeed_sft(world, "killed", 29612)
    process = subprocess.Popen(
        command, cwd=ROOT, env=world.environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_SECONDS
    # between two checkpoints, so that steps are lost and done again
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 6:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or never started"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "DONE").exists()
    world.run(*command)
    again, before = metrics(run), metrics(undisturbed)
    assert [line["step"] for line in again] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr", "supervised_tokens"):
        assert [line[name] for line in again] == pytest.approx([line[name] for line in before], rel=1e-6), name


def test_a_finished_run_says_so(world: World, undisturbed: Path) -> None:
    result = world.run(*deepspeed_sft(world, "undisturbed", 29613))
    assert "is done already" in result.stdout
    assert len(metrics(undisturbed)) == STEPS


def test_one_process_and_another_zero_stage_give_the_same_losses(world: World, undisturbed: Path) -> None:
    flags = world.sft_flags("single", steps=STEPS)
    world.run("torchrun", "--nproc_per_node", "1", str(ROOT / "launcher/sft.py"), *flags, "--parallel.zero_stage", "1")
    for name in ("loss", "grad_norm"):
        single = [line[name] for line in metrics(world.folder / "single")]
        assert single == pytest.approx([line[name] for line in metrics(undisturbed)], rel=1e-4), name


def test_answers_and_a_report_with_pictures(world: World, undisturbed: Path) -> None:
    result = world.run(
        "tools/evaluate.py", str(undisturbed), "--per_task", "6", "--with_run", str(world.folder / "pretrain")
    )
    assert "majority answer" in result.stdout
    answers = [json.loads(line) for line in (undisturbed / "evaluation/answers.jsonl").read_text().splitlines()]
    assert {answer["task"] for answer in answers} >= {"vqav2/count", "vqav2/color", "vqav2/exist", "refcoco/region"}
    page = (undisturbed / "report.html").read_text()
    assert page.count("data:image/") > 8 and "Who sees whom" in page
