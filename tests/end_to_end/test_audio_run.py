"""The drawn recordings from data to accuracy: learnt above chance with both modalities in a prompt, resumed exactly."""

import json
from pathlib import Path

import pytest
from small_demo import ROOT, DemoWorkspace

from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STEPS, STOP = 200, 160


def flags(folder: Path, run: str) -> list[str]:
    data = folder / "tones"
    return [
        "--config", str(ROOT / "configs/demo/audio.yaml"), "--data.root", str(data), "--data.tokenizer",
        str(data / "tokenizer"), "--run.dir", str(folder / run), "--train.steps", str(STEPS), "--log.tensorboard",
        "false", "--log.wandb", "disabled", "--checkpoint.interval", str(STOP), "--checkpoint.keep_every", str(STOP),
        "--log.interval", "60", "--optimizer.warmup_steps", "10",
    ]  # fmt: skip


def test_recordings_and_images_are_learnt_and_a_run_resumes_exactly(demo: DemoWorkspace, tmp_path: Path) -> None:
    demo.run("tools/make_data.py", "tones", "--out", str(tmp_path / "tones"), "--train", "500", "--val", "60")
    demo.run("launcher/sft.py", *flags(tmp_path, "run"))
    losses = [record["loss"] for record in read_metrics(RunPaths(tmp_path / "run").metrics)]
    assert len(losses) == STEPS and sum(losses[-20:]) < 0.75 * sum(losses[20:40])

    checkpoints = tmp_path / "run/checkpoints"
    resumed = tmp_path / "resumed"
    (resumed / "checkpoints").mkdir(parents=True)
    (checkpoints / f"step_{STOP:06d}").rename(resumed / f"checkpoints/step_{STOP:06d}")
    (resumed / "checkpoints/latest").write_text(f"step_{STOP:06d}\n")
    demo.run("launcher/sft.py", *flags(tmp_path, "resumed"))
    again = [record["loss"] for record in read_metrics(RunPaths(resumed).metrics)]
    assert again == losses[STOP:]  # to the bit, of both modalities

    demo.run("tools/evaluate.py", str(tmp_path / "run"))
    scores = {score["task"]: score for score in json.loads((tmp_path / "run/evaluation/scores.json").read_text())}
    assert {task: score["num_questions"] for task, score in scores.items()} == {
        "tones/count": 60, "tones/order": 60, "tones/total": 60,
    }  # fmt: skip
    # one in four by chance; whoever hears or sees alone gets no more than one in four of the totals
    assert scores["tones/count"]["accuracy"] > 50 and scores["tones/total"]["accuracy"] > 35, scores
