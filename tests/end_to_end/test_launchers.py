"""mpirun: ranks find the master address by themselves."""

import pytest
from launchers import MPIRUN_ENVIRONMENT, launcher_command
from small_demo import DemoWorkspace

pytestmark = pytest.mark.end_to_end

FIND_MASTER = """
import os, socket
from aki_megatron.parallel.launch import discover_launch
elsewhere = dict(os.environ, OMPI_COMM_WORLD_LOCAL_SIZE="1")
launch = discover_launch(elsewhere)
assert launch == discover_launch(elsewhere) and launch.master_address == socket.gethostname()
print(f"rank {launch.rank} master {launch.master_address}:{launch.master_port}\\n", end="", flush=True)
"""


def test_ranks_of_several_machines_agree_on_a_master_over_mpi(demo: DemoWorkspace) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed (pip install mpi4py)")
    environment = demo.environment | MPIRUN_ENVIRONMENT
    environment = {name: value for name, value in environment.items() if not name.startswith("MASTER_")}
    result = DemoWorkspace(demo.folder, environment).run(*launcher_command("mpirun", 2), "-c", FIND_MASTER)
    lines = sorted(result.stdout.split("\n")[:2])
    assert [line[:14] for line in lines] == ["rank 0 master ", "rank 1 master "]
    assert lines[0][14:] == lines[1][14:] and int(lines[0].rpartition(":")[2]) > 0
