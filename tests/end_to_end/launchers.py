"""Start ranks with each launcher, or skip where it is not installed."""

import shutil

import pytest
from fault_cases import MPIRUN_ENVIRONMENT, launch_command

__all__ = ["MPIRUN_ENVIRONMENT", "launcher_command"]


def launcher_command(launcher: str, ranks: int) -> list[str]:
    """Return the command before the script; skip the test, with the reason, where the launcher is absent."""
    if shutil.which(launcher) is None and launcher == "mpirun":
        pytest.skip("mpirun is not installed (Debian: apt-get install --no-install-recommends openmpi-bin)")
    return launch_command(launcher, ranks)
