"""Rank, world size and master address of this process, from the environment variables that launchers set.

Under ``mpirun`` on several machines without MASTER_ADDR, ranks agree on a master over MPI.

Launchers nest: a batch script's ``srun`` may start ``torchrun``, and ``mpirun`` starts its daemons through ``srun``. So
the variables of torchrun and deepspeed take precedence over all others, those of ``mpirun`` over those of ``srun``;
RANK, WORLD_SIZE, ... set by hand must agree with the launcher that started the process.
"""

import os
import platform
import re
import socket
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from aki_megatron.errors import ConfigError
from aki_megatron.parallel.mpi import master_over_mpi

LauncherName = Literal["torchrun", "deepspeed", "mpirun", "srun", "environment", "single"]

GENERIC = {
    "rank": "RANK",
    "world_size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_world_size": "LOCAL_WORLD_SIZE",
}
"""Variables of torchrun and deepspeed, which users also set by hand."""

MPIRUN = {
    "rank": "OMPI_COMM_WORLD_RANK",
    "world_size": "OMPI_COMM_WORLD_SIZE",
    "local_rank": "OMPI_COMM_WORLD_LOCAL_RANK",
    "local_world_size": "OMPI_COMM_WORLD_LOCAL_SIZE",
}

SRUN = {"rank": "SLURM_PROCID", "world_size": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}
"""SLURM_STEP_NUM_TASKS exists only inside ``srun``; the batch script itself has SLURM_PROCID and SLURM_NTASKS too."""

JOB_VARIABLES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
"""Together they differ between starts, and are the same for all processes of one."""

TORCHRUN_VARIABLES = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")

FindMaster = Callable[[int], tuple[str, int]]
"""World size -> address and port of rank 0; every rank calls it."""

FIRST_PORT, NUM_PORTS = 20000, 12000
"""Range of rendezvous ports derived from a job's id, below Linux's ephemeral ports."""


LAUNCH_VARIABLES = frozenset(
    (*GENERIC.values(), "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "GROUP_RANK",
     "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "AKI_RUN", "AKI_CONFIG", "AKI_NODES")
)  # fmt: skip
LAUNCH_PREFIXES = ("SLURM_", "PMI", "OMPI_", "PRTE_", "TORCHELASTIC_")
"""Variables that tell a process which one of a job it is; another job must not take them for its own."""

KEPT_VARIABLES = ("SLURM_CONF",)
"""Where Slurm's commands find the cluster."""


RESOLVE_SECONDS = 20
"""How long the name of the master is looked up before it is refused."""


@dataclass(frozen=True)
class Launch:
    """How this process was launched.

    ``local_world_size`` is 0 where the launcher does not set it. The master is where rank 0 listens during start-up.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: LauncherName
    master_address: str = "127.0.0.1"
    master_port: int = 0
    attempt: str = field(default="", compare=False)
    """Id of this attempt of the run: under Slurm the job id and its restart count, for all ranks the same."""
    start_id: str = field(default="", compare=False)
    """What the ranks of this start have in common, whatever started them; part of file names."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"{self.launcher}: rank {self.rank} must lie in [0, {self.world_size}), the number of processes."
            )
        if self.local_rank < 0:
            raise ConfigError(f"{self.launcher}: local rank {self.local_rank} must not be negative.")


def discover_launch(environ: Mapping[str, str], *, find_master: FindMaster = master_over_mpi) -> Launch:
    """Return how this process was launched.

    Supports torchrun, deepspeed, mpirun (Open MPI) and srun, RANK, WORLD_SIZE, ... set by hand, and none of them (a
    world of one). ``find_master`` is called under mpirun where no variable tells the master.

    Raises ConfigError that lists the variables when they are incomplete, not numbers, or contradict each other.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _launch("torchrun", environ, GENERIC, find_master)
    if "CROSS_RANK" in environ and "RANK" in environ:
        return _launch("deepspeed", environ, GENERIC | {"local_world_size": "LOCAL_SIZE"}, find_master)
    for name, variables in (("mpirun", MPIRUN), ("srun", SRUN)):
        if variables["rank"] in environ and variables["world_size"] in environ:
            return _launch(name, environ, variables, find_master)  # type: ignore[arg-type]
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _launch("environment", environ, GENERIC, find_master)
    attempt = _attempt(environ)
    return Launch(0, 0, 1, 1, launcher="single", attempt=attempt, start_id=attempt)


def without_launch(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what the launcher and the scheduler of this process have set in it."""
    return {
        name: value
        for name, value in environ.items()
        if name in KEPT_VARIABLES or not (name in LAUNCH_VARIABLES or name.startswith(LAUNCH_PREFIXES))
    }


def _launch(
    name: LauncherName, environ: Mapping[str, str], variables: Mapping[str, str], find_master: FindMaster
) -> Launch:
    values = {key: _number(environ, variable) for key, variable in variables.items() if variable in environ}
    if missing := [variables[key] for key in ("rank", "world_size") if key not in values]:
        raise ConfigError(
            f"{_listed(environ)} set without {', '.join(missing)}: set RANK and WORLD_SIZE (and LOCAL_RANK, "
            "MASTER_ADDR, MASTER_PORT), or none of them for a single process."
        )
    _refuse_contradiction(name, values, environ)
    address, port = _master(name, values, environ, find_master)
    return Launch(
        rank=values["rank"],
        local_rank=values.get("local_rank", values["rank"] if name == "environment" else 0),
        world_size=values["world_size"],
        local_world_size=values.get("local_world_size", 0),
        launcher=name,
        master_address=address,
        master_port=port,
        attempt=_attempt(environ),
        start_id=_start_id(environ, address, port),
    )


def _attempt(environ: Mapping[str, str]) -> str:
    """Under Slurm an id that the batch script can compute too; elsewhere one per process."""
    if job := environ.get("SLURM_JOB_ID"):
        return f"{job}.{environ.get('SLURM_RESTART_COUNT', '0')}"
    return f"{platform.node()}-{os.getpid()}-{time.time():.0f}"


def _start_id(environ: Mapping[str, str], address: str, port: int) -> str:
    """Name a start by its job and by where its ranks meet: all of them know that before they meet."""
    host = platform.node() if address in ("127.0.0.1", "localhost", "::1") else address
    job = "-".join(environ.get(variable, "") for variable in (*JOB_VARIABLES, *TORCHRUN_VARIABLES))
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{host}-{port}")[-60:]
    return f"{readable}-{zlib.crc32(f'{host}-{port}-{job}'.encode()):08x}"


def _refuse_contradiction(name: LauncherName, values: Mapping[str, int], environ: Mapping[str, str]) -> None:
    """Raise ConfigError where RANK, WORLD_SIZE, ... set by hand differ from what mpirun or srun sets."""
    if name not in ("mpirun", "srun"):
        return
    for key, variable in GENERIC.items():
        if variable in environ and key in values and _number(environ, variable) != values[key]:
            raise ConfigError(
                f"The variables of {name} contradict {variable}={environ[variable]}: {_listed(environ)}. "
                f"Unset {variable}, or start the processes with the launcher that {variable} belongs to."
            )


def _master(
    name: LauncherName, values: Mapping[str, int], environ: Mapping[str, str], find_master: FindMaster
) -> tuple[str, int]:
    """Return the address and port at which rank 0 listens, derived from the job where no variable tells them."""
    address = environ.get("MASTER_ADDR", "")
    if not address and name == "srun":
        address = first_host(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "")))
    if not address and values["world_size"] == values.get("local_world_size", 1 if name != "environment" else 0):
        address = "127.0.0.1"
    if not address and name == "mpirun":
        address, port = find_master(values["world_size"])
        return address, _port(environ) if "MASTER_PORT" in environ else port
    if not address:
        raise ConfigError(
            f"{name} starts {values['world_size']} processes on several machines but MASTER_ADDR is not set "
            f"({_listed(environ)}): export MASTER_ADDR=<host of rank 0>."
        )
    if "MASTER_PORT" in environ:
        return address, _port(environ)
    # all processes of a job must derive the same port, other jobs and requeues another one
    job = "-".join(environ.get(variable, "") for variable in JOB_VARIABLES)
    return address, FIRST_PORT + zlib.crc32(job.encode()) % NUM_PORTS


def _port(environ: Mapping[str, str]) -> int:
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise ConfigError(
            f"MASTER_PORT={port} must be a free port of rank 0's host, from 1 to 65535 ({_listed(environ)})."
        )
    return port


def check_master(
    launch: Launch,
    *,
    resolve: Callable[[str, int], object] = socket.getaddrinfo,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Raise ConfigError where the master of several processes has no address; torch would wait for it for minutes.

    A name server that is slow at the start of a job gets RESOLVE_SECONDS.
    """
    if launch.world_size == 1:
        return
    for _ in range(RESOLVE_SECONDS):
        try:
            resolve(launch.master_address, launch.master_port)
            return
        except (OSError, UnicodeError) as error:
            reason = error
            sleep(1.0)
    raise ConfigError(
        f"MASTER_ADDR={launch.master_address} has no address on {platform.node()} ({reason}): set it to the host name "
        "or IP address of rank 0, as the other hosts know it."
    )


def first_host(hosts: str) -> str:
    """Return the first name of a Slurm host list: ``gpu[03-07,9],login`` gives ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", hosts)
    return "".join(part or "" for part in match.groups()) if match else ""


def _number(environ: Mapping[str, str], variable: str) -> int:
    try:
        return int(environ[variable])
    except ValueError:
        raise ConfigError(f"{variable}={environ[variable]!r} must be a whole number ({_listed(environ)}).") from None


def _listed(environ: Mapping[str, str]) -> str:
    names = [*GENERIC.values(), *MPIRUN.values(), *SRUN.values(), "MASTER_ADDR", "MASTER_PORT"]
    return ", ".join(f"{name}={environ[name]}" for name in names if name in environ) or "no launcher variables"
