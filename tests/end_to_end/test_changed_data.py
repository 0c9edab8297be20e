"""A run that goes on: data that changed is refused, data that moved is the same, a change that is named is recorded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_demo import DemoWorkspace

from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.sample_audit import read_sample_audit

pytestmark = pytest.mark.end_to_end

QUESTIONS = "VQA/v2_OpenEnded_mscoco_train2014_questions.json"


def rewind(run: Path) -> None:
    """Take a run back to its checkpoint of step 4."""
    (run / "DONE").unlink()
    shutil.rmtree(run / "checkpoints/step_000008")


def edit_question(data: Path) -> None:
    path = data / QUESTIONS
    content = json.loads(path.read_text())
    content["questions"][0]["question"] += "?"
    path.write_text(json.dumps(content))


def replace_image(data: Path) -> None:
    first, second = sorted((data / "VQA/train2014").iterdir())[:2]
    shutil.copy(second, first)


def exchange_tokens(data: Path) -> None:
    path = data / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [token for token in vocabulary if len(token) == 1 and token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "question": (edit_question, f"source vqav2, file {QUESTIONS} ("),
    "image": (replace_image, "source vqav2, images VQA/train2014 ("),
    "tokenizer": (exchange_tokens, "tokenizer, file tokenizer.json ("),
}


@pytest.mark.timeout(600)
def test_changed_data_is_refused_and_moved_data_is_not(demo: DemoWorkspace, tmp_path: Path) -> None:
    run = demo.folder / "changed_data"
    command = ["launcher/sft.py", *demo.sft_flags(run.name, steps=8), "--data.num_workers", "0"]
    demo.run(*command)
    audit, config = read_sample_audit(run), (run / "config.yaml").read_text()
    for what, (change, message) in CHANGES.items():
        if what == "question":
            rewind(run)
        data = Path(shutil.copytree(demo.folder / "data", tmp_path / what, copy_function=shutil.copy))
        change(data)
        moved = ["--data.root", str(data), "--data.tokenizer", str(data / "tokenizer")]
        result = demo.run(*command, *moved, ok=False)
        text = " ".join((result.stdout + result.stderr).split())
        assert result.returncode != 0 and "The data is not what" in text and message in text, text
        assert "Traceback" not in text and (run / "config.yaml").read_text() == config

    data = Path(shutil.copytree(demo.folder / "data", tmp_path / "moved", copy_function=shutil.copy))
    moved = ["--data.root", str(data), "--data.tokenizer", str(data / "tokenizer")]
    demo.run(*command, *moved)
    assert read_sample_audit(run) == audit

    rewind(run)
    edit_question(data)
    demo.run(*command, *moved, "--allow_change", "data.root")
    assert [step.samples for step in read_sample_audit(run).values()] == [step.samples for step in audit.values()]
    events = [event["text"] for event in read_events(RunPaths(run)) if event["kind"] == "change"]
    assert any(text.startswith(f"source vqav2, file {QUESTIONS} (") for text in events)
