"""Address and port of rank 0, agreed on over MPI under mpirun. The only module that imports mpi4py."""

import socket
from functools import cache

from aki_megatron.errors import ConfigError

ALTERNATIVE = "or export MASTER_ADDR=<host of rank 0> (mpirun: -x MASTER_ADDR=...)"


@cache
def master_over_mpi(world_size: int) -> tuple[str, int]:
    """Return the host name of rank 0 and a port that is free there; every rank calls it.

    MPI is finalized again at once.

    Raises ConfigError without a working mpi4py, or with one of another MPI than mpirun's.
    """
    try:
        import mpi4py

        # after MPI is finalized here a process ends like any other, with its own exit code
        mpi4py.rc(initialize=False, finalize=False)
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # no mpi4py, or no MPI library that it could load
        raise ConfigError(
            f"mpirun started {world_size} processes on several machines and MASTER_ADDR is not set; to agree on one "
            f"they need mpi4py, which cannot be used ({' '.join(str(error).split())}): pip install mpi4py, "
            f"{ALTERNATIVE}."
        ) from error
    MPI.Init()
    ranks = MPI.COMM_WORLD.Get_size()
    here = (socket.gethostname(), _free_port()) if MPI.COMM_WORLD.Get_rank() == 0 else None
    master: tuple[str, int] = MPI.COMM_WORLD.bcast(here, root=0)
    library = MPI.Get_library_version().split(",")[0]
    MPI.Finalize()
    if ranks != world_size:
        raise ConfigError(
            f"mpirun started {world_size} processes but mpi4py sees {ranks}: it uses another MPI ({library}). "
            f"Install mpi4py for the MPI of mpirun (pip install --no-binary mpi4py mpi4py), {ALTERNATIVE}."
        )
    return master


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
