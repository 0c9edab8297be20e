"""Start ranks with each launcher, or skip where it is not installed."""

import shutil
import socket
import sys

import pytest

MPIRUN_ENVIRONMENT = {
    # a container's only user is root, and a small machine has fewer cores than a test has ranks
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def launcher_command(launcher: str, ranks: int) -> list[str]:
    """Return the command before the script; skip the test, with the reason, where the launcher is absent."""
    if shutil.which(launcher) is None and launcher == "mpirun":
        pytest.skip("mpirun is not installed (Debian: apt-get install --no-install-recommends openmpi-bin)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {
        "torchrun": ["torchrun", "--nproc_per_node", str(ranks), "--master_port", port],
        "deepspeed": ["deepspeed", "--num_gpus", str(ranks), "--master_port", port],
        "mpirun": ["mpirun", "-np", str(ranks), sys.executable],
    }[launcher]
