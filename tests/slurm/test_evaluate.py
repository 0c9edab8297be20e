"""A model answers benchmarks in one short job of two tasks, started as slurm/evaluate.sbatch says."""

import base64
import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from slurm_cluster import Cluster, Job
from tiny_checkpoint import write_tiny_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

QUESTIONS = 24


def write_questions(folder: Path) -> Path:
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), "red").save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    with (folder / "POPE.tsv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t", lineterminator="\n")
        rows.writerow(["index", "image", "question", "answer", "category"])
        rows.writerows([number, image, "Is there a cat?", "Yes", "random"] for number in range(QUESTIONS))
    return folder


def test_two_tasks_answer_every_question_once(cluster: Cluster, tmp_path: Path) -> None:
    checkpoint, data = write_tiny_checkpoint(tmp_path / "model"), write_questions(tmp_path / "data")
    out, output = tmp_path / "out", tmp_path / "%j.log"
    job = Job(cluster, "", out, str(output), tmp_path / "orders")
    job.id = cluster.run(
        "sbatch", "--parsable", f"--output={output}", "--ntasks-per-node=2", "--gpus-per-node=2",
        "slurm/evaluate.sbatch", "run", str(checkpoint), "--out", str(out), "--data", str(data),
        "--benchmarks", "POPE", "--max_new_tokens", "4", "--batch_size", "2", "--score",
    ).strip()  # fmt: skip
    job.wait_for_end("COMPLETED")
    assert "24 of 24 questions to answer, 2 models" in job.log(), job.explain()
    lines = [line for path in out.glob("POPE/predictions_*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(int(json.loads(line)["question"]["id"]) for line in lines) == list(range(QUESTIONS))
    assert (out / "scores.json").exists() and not (out / "RUNNING").exists() and job.left_behind() == []
