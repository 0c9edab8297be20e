"""What a new user gets for a mistake: one message that says what to change, exit code 2, no traceback."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from small_demo import World

pytestmark = pytest.mark.end_to_end


def refused(result: subprocess.CompletedProcess[str], *words: str) -> str:
    """The one message of a refused command; it holds every word."""
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
def test_wrong_settings(world: World, tmp_path: Path, flags: list[str], words: list[str]) -> None:
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 999}))
    flags = [str(settings) if flag == "CONTRADICTION" else flag for flag in flags]
    refused(world.run("launcher/sft.py", *world.sft_flags("wrong", steps=10), *flags, ok=False), *words)


def test_captions_with_mutual_attention(world: World) -> None:
    flags = ["--config", "configs/demo/pretrain.yaml", "--attention.rule", "mma"]
    refused(world.run("launcher/pretrain.py", *flags, ok=False), "attention.rule", "captions", "causal")


@pytest.mark.parametrize(
    ("launcher", "keys"),
    [("pretrain", ["init.vision", "init.language", "data.captions kale"]), ("sft", ["init.weights", "vqav2"])],
)
def test_the_default_run_says_all_that_is_missing(world: World, tmp_path: Path, launcher: str, keys: list[str]) -> None:
    flags = [
        "--ds_config",
        "configs/zero3.json",
        "--run.dir",
        str(tmp_path / "run"),
    ]
    message = refused(world.run(f"launcher/{launcher}.py", *flags, ok=False), *keys, "data.tokenizer")
    assert "looked for from" in message and "make demo" in message
    assert not (tmp_path / "run").exists()


def copied_data(world: World, tmp_path: Path) -> Path:
    copy = tmp_path / "data"
    shutil.copytree(world.folder / "data", copy)
    return copy


def test_unreadable_images_are_named_and_stop_the_run(world: World, tmp_path: Path) -> None:
    data = copied_data(world, tmp_path)
    for picture in (data / "VQA/train2014").iterdir():
        picture.write_bytes(b"not a picture")
    flags = [*world.sft_flags("unreadable", steps=10), "--data.root", str(data)]
    refused(world.run("launcher/sft.py", *flags, ok=False), "COCO_train2014_", "data.max_bad_fraction")


def test_a_corrupt_checkpoint_is_named(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "pretrain"
    shutil.copytree(world.folder / "pretrain", broken)
    file = next((broken / "checkpoints/step_000004").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    flags = [*world.sft_flags("corrupt", steps=10), "--init.weights", str(broken)]
    refused(world.run("launcher/sft.py", *flags, ok=False), file.name, "step_000004")


def test_a_run_folder_of_another_run_is_not_continued(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(world.folder / "pretrain", run)
    (run / "DONE").unlink()
    flags = [*world.sft_flags("x", steps=10), "--run.dir", str(run)]
    refused(world.run("launcher/sft.py", *flags, ok=False), "config.yaml", "attention.rule", "--run.dir")


def test_a_run_that_is_not_there_is_not_evaluated(world: World, tmp_path: Path) -> None:
    result = world.run("tools/evaluate.py", str(tmp_path), ok=False)
    assert result.returncode == 2 and "config.yaml" in result.stdout + result.stderr
