"""A temporary Slurm cluster, started once per pytest run, and a small run to train on it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import yaml
from slurm_cluster import PREFLIGHT, ROOT, STEPS, Cluster, Job

from aki_megatron.config.run_file import read_run_file

NODES = 4
PACED = Path(__file__).with_name("paced.py")
NEEDED = ("slurmctld", "slurmd", "munged")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yield a cluster of four nodes with eight simulated GPUs each."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in NEEDED if shutil.which(name, path=path) is None]:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)")
    folder = tmp_path_factory.mktemp("slurm")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "AKI_"))}
    started = Cluster(folder / "cluster", clean | {"SLURM_CONF": str(folder / "cluster/slurm.conf")})
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {PACED} "$@"\n')
    python.chmod(0o755)
    site = f"source {started.folder}/site.env\nPYTHON={python}\nHOST_PYTHON={sys.executable}\nGIVE_UP_AFTER=2\n"
    (folder / PREFLIGHT).write_text(site)
    (folder / "site.env").write_text(site + "PREFLIGHT=()\n")
    started.environment["AKI_SITE"] = str(folder / "site.env")
    try:
        print(started.control("up", str(NODES)))
        yield started
    finally:
        started.control("down")
    assert started.control("processes") == "", "the cluster left processes behind"


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run: synthetic data, one layer, no DeepSpeed, which takes long to start."""
    folder = tmp_path_factory.mktemp("demo")
    data = folder / "data"
    subprocess.run(
        [sys.executable, "tools/make_data.py", "--out", str(data), "--train_scenes", "60", "--val_scenes", "10"],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=240,
    )  # fmt: skip
    run = read_run_file(ROOT / "configs/demo/sft.yaml").values
    run["init"] = {}
    run["model"]["decoder"]["num_layers"] = 1
    run["data"] |= {"root": str(data), "tokenizer": str(data / "tokenizer")}
    run["train"] |= {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2}
    run["optimizer"] |= {"warmup_steps": 2, "eps": 1e-5}
    run["parallel"] = {"zero_stage": 0}
    run["checkpoint"] = {"interval": 2}
    run["log"] = {"interval": 10, "tensorboard": False, "wandb": "offline"}
    path = folder / "causal.yaml"  # for slurm/section42.sbatch, which finds configurations by the name of the method
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.fixture
def submit(cluster: Cluster, config: Path, tmp_path: Path) -> Callable[..., Job]:
    """``submit("--nodes=2", "slurm/x.sbatch", flags..., seconds=pace, NAME=value...)``: a job that has been queued."""
    number = count()

    def queue(*arguments: str, seconds: float = 0.0, **environment: str) -> Job:
        folder = tmp_path / f"run_{next(number)}"
        orders = folder.with_suffix(".orders")
        output = str(tmp_path / "%j.log")
        job = Job(cluster, "", Path(environment.get("AKI_RUN", folder)), output, orders)
        job.order(seconds=seconds)
        outside = {"AKI_CONFIG": str(config), "AKI_RUN": str(folder), "AKI_TEST_ORDERS": str(orders)} | environment
        job.id = cluster.run("sbatch", "--parsable", f"--output={output}", *arguments, **outside).strip()
        return job

    return queue
