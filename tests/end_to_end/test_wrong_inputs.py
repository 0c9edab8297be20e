"""Mistakes of a new user: one error that says what to change, exit code 2, no traceback."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from small_demo import DemoWorkspace

pytestmark = pytest.mark.end_to_end


def refused(result: subprocess.CompletedProcess[str], *words: str) -> str:
    """Return the one error of a refused command, after checking that it holds every word."""
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr.count("error") >= 1
    for word in words:
        assert word in result.stderr, f"{word!r} not in\n{result.stderr}"
    return result.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.stepz", "5"], ["train.stepz", "train.steps"]),
        (["--train.steps", "many"], ["train.steps", "many"]),
        (["--parallel.tensor", "3"], ["parallel.tensor", "3", "[1, 2, 4]"]),
        (["--optimizer.warmup_steps", "90"], ["optimizer.warmup_steps", "train.steps"]),
        (["--data.root", "/nowhere/at/all"], ["/nowhere/at/all", "make demo"]),
        (["--ds_config", "CONTRADICTION"], ["zero_optimization.stage", "parallel.zero_stage", "train_batch_size"]),
    ],
    ids=["unknown key", "wrong type", "tensor size", "warm-up", "missing data", "ds_config"],
)
def test_wrong_settings(demo: DemoWorkspace, tmp_path: Path, flags: list[str], words: list[str]) -> None:
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 999}))
    flags = [str(settings) if flag == "CONTRADICTION" else flag for flag in flags]
    refused(demo.run("launcher/sft.py", *demo.sft_flags("wrong", steps=10), *flags, ok=False), *words)


def test_captions_with_mma_are_refused(demo: DemoWorkspace) -> None:
    flags = ["--config", "configs/demo/pretrain.yaml", "--attention.rule", "mma"]
    refused(demo.run("launcher/pretrain.py", *flags, ok=False), "attention.rule", "captions", "causal")


@pytest.mark.parametrize(
    ("launcher", "keys"),
    [("pretrain", ["init.vision", "init.language", "data.captions kale"]), ("sft", ["init.weights", "vqav2"])],
)
def test_the_default_run_lists_all_missing_files(
    demo: DemoWorkspace, tmp_path: Path, launcher: str, keys: list[str]
) -> None:
    flags = [
        "--ds_config",
        "configs/zero3.json",
        "--run.dir",
        str(tmp_path / "run"),
    ]
    message = refused(demo.run(f"launcher/{launcher}.py", *flags, ok=False), *keys, "data.tokenizer")
    assert "looked for from" in message and "make demo" in message
    assert not (tmp_path / "run").exists()


def copied_data(demo: DemoWorkspace, tmp_path: Path) -> Path:
    copy = tmp_path / "data"
    shutil.copytree(demo.folder / "data", copy)
    return copy


def test_unreadable_images_are_named_and_stop_the_run(demo: DemoWorkspace, tmp_path: Path) -> None:
    data = copied_data(demo, tmp_path)
    for image in (data / "VQA/train2014").iterdir():
        image.write_bytes(b"not an image")
    flags = [*demo.sft_flags("unreadable", steps=10), "--data.root", str(data)]
    refused(demo.run("launcher/sft.py", *flags, ok=False), "COCO_train2014_", "data.max_bad_fraction")


def test_a_corrupt_checkpoint_is_named(demo: DemoWorkspace, tmp_path: Path) -> None:
    broken = tmp_path / "pretrain"
    shutil.copytree(demo.folder / "pretrain", broken)
    file = next((broken / "checkpoints/step_000004").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    flags = [*demo.sft_flags("corrupt", steps=10), "--init.weights", str(broken)]
    refused(demo.run("launcher/sft.py", *flags, ok=False), file.name, "step_000004")


def test_the_folder_of_another_run_is_not_resumed(demo: DemoWorkspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo.folder / "pretrain", run)
    (run / "DONE").unlink()
    flags = [*demo.sft_flags("x", steps=10), "--run.dir", str(run)]
    refused(demo.run("launcher/sft.py", *flags, ok=False), "config.yaml", "attention.rule", "--run.dir")


def test_a_missing_run_is_not_evaluated(demo: DemoWorkspace, tmp_path: Path) -> None:
    result = demo.run("tools/evaluate.py", str(tmp_path), ok=False)
    assert result.returncode == 2 and "config.yaml" in result.stdout + result.stderr
