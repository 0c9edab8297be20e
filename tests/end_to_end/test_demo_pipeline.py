"""The launchers on real files: train, kill, resume, evaluate, report."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_demo import ROOT, TIMEOUT_SECONDS, DemoWorkspace

pytestmark = pytest.mark.end_to_end

STEPS = 14
DEEPSPEED = ("deepspeed", "--num_gpus", "2", "--master_port")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def deepspeed_sft(demo: DemoWorkspace, run: str, port: int) -> list[str]:
    launcher = str(ROOT / "launcher/sft.py")
    zero3 = ["--ds_config", str(ROOT / "configs/zero3.json")]
    return [*DEEPSPEED, str(port), launcher, *zero3, *demo.sft_flags(run, steps=STEPS)]


@pytest.fixture(scope="module")
def uninterrupted(demo: DemoWorkspace) -> Path:
    demo.run(*deepspeed_sft(demo, "uninterrupted", 29611))
    return demo.folder / "uninterrupted"


def test_the_run_folder_holds_the_files_of_the_readme(uninterrupted: Path) -> None:
    assert [line["step"] for line in metrics(uninterrupted)] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (uninterrupted / "checkpoints").glob("step_*")) == [
        "step_000012",
        "step_000014",
    ]
    for name in ("config.yaml", "report.html", "DONE", "logs/rank_0.log", "logs/rank_1.log"):
        assert (uninterrupted / name).stat().st_size > 0, name
    assert all(line["images"] == 8 and line["supervised_tokens"] > 8 for line in metrics(uninterrupted))


def test_a_killed_run_ends_with_the_losses_of_an_undisturbed_one(demo: DemoWorkspace, uninterrupted: Path) -> None:
    run = demo.folder / "killed"
    command = deepspeed_sft(demo, "killed", 29612)
    process = subprocess.Popen(
        command, cwd=ROOT, env=demo.environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_SECONDS
    # between two checkpoints, so that steps are repeated
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 6:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or never started"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "DONE").exists()
    demo.run(*command)
    resumed, expected = metrics(run), metrics(uninterrupted)
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr", "supervised_tokens"):
        assert [line[name] for line in resumed] == pytest.approx([line[name] for line in expected], rel=1e-6), name


def test_a_finished_run_is_not_started_again(demo: DemoWorkspace, uninterrupted: Path) -> None:
    result = demo.run(*deepspeed_sft(demo, "uninterrupted", 29613))
    assert "is done already" in result.stdout
    assert len(metrics(uninterrupted)) == STEPS


def test_one_process_and_another_zero_stage_give_the_same_losses(demo: DemoWorkspace, uninterrupted: Path) -> None:
    flags = demo.sft_flags("single", steps=STEPS)
    demo.run("torchrun", "--nproc_per_node", "1", str(ROOT / "launcher/sft.py"), *flags, "--parallel.zero_stage", "1")
    for name in ("loss", "grad_norm"):
        single = [line[name] for line in metrics(demo.folder / "single")]
        assert single == pytest.approx([line[name] for line in metrics(uninterrupted)], rel=1e-4), name


def test_answers_and_a_report_with_pictures(demo: DemoWorkspace, uninterrupted: Path) -> None:
    result = demo.run(
        "tools/evaluate.py", str(uninterrupted), "--per_task", "6", "--with_run", str(demo.folder / "pretrain")
    )
    assert "majority-class baseline" in result.stdout
    answers = [json.loads(line) for line in (uninterrupted / "evaluation/predictions.jsonl").read_text().splitlines()]
    assert {answer["task"] for answer in answers} >= {"vqav2/count", "vqav2/color", "vqav2/exist", "refcoco/region"}
    page = (uninterrupted / "report.html").read_text()
    assert page.count("data:image/") > 8 and "Attention mask of one sample" in page
