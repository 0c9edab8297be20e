"""mpirun trains as torchrun does, and finds a master by itself."""

import json
from pathlib import Path

import pytest
from launchers import MPIRUN_ENVIRONMENT, launcher_command
from small_demo import ROOT, World

pytestmark = pytest.mark.end_to_end

STEPS = 3

FIND_MASTER = """
import os, socket
from aki_megatron.parallel.launch import discover_launch
elsewhere = dict(os.environ, OMPI_COMM_WORLD_LOCAL_SIZE="1")
launch = discover_launch(elsewhere)
assert launch == discover_launch(elsewhere) and launch.master_address == socket.gethostname()
print(f"rank {launch.rank} master {launch.master_address}:{launch.master_port}\\n", end="", flush=True)
"""


def test_mpirun_gives_the_metrics_of_torchrun(world: World) -> None:
    lines = {}
    for launcher in ("mpirun", "torchrun"):
        command = launcher_command(launcher, 2)
        flags = [*world.sft_flags(f"by_{launcher}", steps=STEPS), "--optimizer.warmup_steps", "1"]
        environment = world.environment | MPIRUN_ENVIRONMENT
        World(world.folder, environment).run(*command, str(ROOT / "launcher/sft.py"), *flags)
        path: Path = world.folder / f"by_{launcher}" / "metrics.jsonl"
        lines[launcher] = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines["mpirun"]] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr", "supervised_tokens", "images"):
        of_torchrun = [line[name] for line in lines["torchrun"]]
        assert [line[name] for line in lines["mpirun"]] == pytest.approx(of_torchrun, rel=1e-6), name


def test_ranks_of_several_machines_agree_on_a_master_over_mpi(world: World) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed (pip install mpi4py)")
    environment = world.environment | MPIRUN_ENVIRONMENT
    environment = {name: value for name, value in environment.items() if not name.startswith("MASTER_")}
    result = World(world.folder, environment).run(*launcher_command("mpirun", 2), "-c", FIND_MASTER)
    said = sorted(result.stdout.split("\n")[:2])
    assert [line[:14] for line in said] == ["rank 0 master ", "rank 1 master "]
    assert said[0][14:] == said[1][14:] and int(said[0].rpartition(":")[2]) > 0
