"""A small copy of the demo, built once per pytest run by the project's own commands."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from small_demo import ROOT, DemoWorkspace


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoWorkspace:
    """Return a folder with synthetic data, a briefly trained encoder, and a briefly pretrained model."""
    bin_folder = str(Path(sys.executable).parent)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore",
        "PATH": f"{bin_folder}{os.pathsep}{environment.get('PATH', '')}",
    }  # fmt: skip
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make_small_demo(DemoWorkspace(tmp_path_factory.mktemp("demo"), environment))
    # the workers of one pytest run share the parent of their temporary folders
    folder = tmp_path_factory.getbasetemp().parent / "demo"
    with FileLock(folder.with_suffix(".lock")):
        if (folder / "READY").exists():
            return DemoWorkspace(folder, environment)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        workspace = make_small_demo(DemoWorkspace(folder, environment))
        (folder / "READY").touch()
        return workspace


def make_small_demo(demo: DemoWorkspace) -> DemoWorkspace:
    """Run the commands: data, encoder, pretraining."""
    data = demo.folder / "data"
    demo.run("tools/make_data.py", "--out", str(data), "--train_scenes", "120", "--val_scenes", "20")
    demo.run(
        "tools/train_encoder.py", "--data", str(data), "--out", str(data / "encoder"), "--steps", "60",
        "--min_accuracy", "0",
    )  # fmt: skip
    demo.run(
        "launcher/pretrain.py", "--config", str(ROOT / "configs/demo/pretrain.yaml"), *demo.data_flags(),
        "--data.captions", '[{name: captions, shards: ["captions/00000.tar"]}]', "--init.vision", str(data / "encoder"),
        "--run.dir", str(demo.folder / "pretrain"), "--train.steps", "4", "--optimizer.warmup_steps", "2",
        "--train.global_batch_size", "8", "--train.micro_batch_size", "8", "--checkpoint.interval", "4",
    )  # fmt: skip
    return demo
