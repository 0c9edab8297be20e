"""A small copy of the demo, made once per pytest run by the project's own commands."""

import os
import sys
from pathlib import Path

import pytest
from small_demo import ROOT, World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Drawn data, a briefly trained encoder, a briefly pretrained model."""
    bin_folder = str(Path(sys.executable).parent)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore",
        "PATH": f"{bin_folder}{os.pathsep}{environment.get('PATH', '')}",
    }  # fmt: skip
    made = World(tmp_path_factory.mktemp("demo"), environment)
    data = made.folder / "data"
    made.run("tools/make_data.py", "--out", str(data), "--scenes", "120", "--held_out", "20")
    made.run(
        "tools/train_encoder.py", "--data", str(data), "--out", str(data / "encoder"), "--steps", "60",
        "--least_accuracy", "0",
    )  # fmt: skip
    made.run(
        "launcher/pretrain.py", "--config", str(ROOT / "configs/demo/pretrain.yaml"), *made.data_flags(),
        "--data.captions", '[{name: captions, shards: ["captions/00000.tar"]}]', "--init.vision", str(data / "encoder"),
        "--run.dir", str(made.folder / "pretrain"), "--train.steps", "4", "--optimizer.warmup_steps", "2",
        "--train.global_batch_size", "8", "--train.micro_batch_size", "8", "--checkpoint.interval", "4",
    )  # fmt: skip
    return made
