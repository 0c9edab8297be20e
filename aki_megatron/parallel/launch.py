"""Which process of which world this is, by the variables a launcher sets: takes the environment, returns facts.

Pure but for one case: under ``mpirun`` on several machines without MASTER_ADDR, ranks agree on a master over MPI.

Launchers nest: a batch script's ``srun`` may start ``torchrun``, and ``mpirun`` starts its daemons through ``srun``. So
torchrun and deepspeed, which start their own processes, always win; ``mpirun`` wins over ``srun``; plain RANK,
WORLD_SIZE, ... set by hand must agree with the launcher that started the process.
"""

import os
import platform
import re
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
"""Variables of torchrun and deepspeed; users set them by hand as well."""

MPIRUN = {
    "rank": "OMPI_COMM_WORLD_RANK",
    "world_size": "OMPI_COMM_WORLD_SIZE",
    "local_rank": "OMPI_COMM_WORLD_LOCAL_RANK",
    "local_world_size": "OMPI_COMM_WORLD_LOCAL_SIZE",
}

SRUN = {"rank": "SLURM_PROCID", "world_size": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}
"""SLURM_STEP_NUM_TASKS exists only inside ``srun``; the batch script itself has SLURM_PROCID and SLURM_NTASKS too."""

Agree = Callable[[int], tuple[str, int]]
"""World size -> address and port of a master; every rank calls it."""

FIRST_PORT, NUM_PORTS = 20000, 12000
"""Rendezvous ports derived from a job's name lie here, below the range of Linux's ephemeral ports."""


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process.

    ``local_world_size`` is 0 where the launcher does not tell it. The master is where rank 0 listens during start-up.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: LauncherName
    master_address: str = "127.0.0.1"
    master_port: int = 0
    attempt: str = field(default="", compare=False)
    """Names this start of the run: job and number of its restart under Slurm, whatever starts the processes there."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"{self.launcher}: rank {self.rank} must lie in [0, {self.world_size}), the number of processes."
            )
        if self.local_rank < 0:
            raise ConfigError(f"{self.launcher}: local rank {self.local_rank} must not be negative.")


def discover_launch(environ: Mapping[str, str], *, agree: Agree = master_over_mpi) -> Launch:
    """The launch this process belongs to.

    Works under torchrun, deepspeed, mpirun (Open MPI) and srun, with RANK and friends set by hand, and with none of
    them (a world of one). ``agree`` finds a master for mpirun's ranks where only they can.

    Errors: ConfigError that lists the variables when they are incomplete, not numbers, or contradict each other.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _launch("torchrun", environ, GENERIC, agree)
    if "CROSS_RANK" in environ and "RANK" in environ:
        return _launch("deepspeed", environ, GENERIC | {"local_world_size": "LOCAL_SIZE"}, agree)
    for name, variables in (("mpirun", MPIRUN), ("srun", SRUN)):
        if variables["rank"] in environ and variables["world_size"] in environ:
            return _launch(name, environ, variables, agree)  # type: ignore[arg-type]
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _launch("environment", environ, GENERIC, agree)
    return Launch(rank=0, local_rank=0, world_size=1, local_world_size=1, launcher="single", attempt=_attempt(environ))


def _launch(name: LauncherName, environ: Mapping[str, str], variables: Mapping[str, str], agree: Agree) -> Launch:
    facts = {fact: _number(environ, variable) for fact, variable in variables.items() if variable in environ}
    if missing := [variables[fact] for fact in ("rank", "world_size") if fact not in facts]:
        raise ConfigError(
            f"{_listed(environ)} set without {', '.join(missing)}: set RANK and WORLD_SIZE (and LOCAL_RANK, "
            "MASTER_ADDR, MASTER_PORT), or none of them for a single process."
        )
    _refuse_contradiction(name, facts, environ)
    address, port = _master(name, facts, environ, agree)
    return Launch(
        rank=facts["rank"],
        local_rank=facts.get("local_rank", facts["rank"] if name == "environment" else 0),
        world_size=facts["world_size"],
        local_world_size=facts.get("local_world_size", 0),
        launcher=name,
        master_address=address,
        master_port=port,
        attempt=_attempt(environ),
    )


def _attempt(environ: Mapping[str, str]) -> str:
    """What a batch script knows as well as its ranks; elsewhere a name of its own for each process."""
    if job := environ.get("SLURM_JOB_ID"):
        return f"{job}.{environ.get('SLURM_RESTART_COUNT', '0')}"
    return f"{platform.node()}-{os.getpid()}-{time.time():.0f}"


def _refuse_contradiction(name: LauncherName, facts: Mapping[str, int], environ: Mapping[str, str]) -> None:
    """RANK and friends set by hand must say what mpirun or srun says."""
    if name not in ("mpirun", "srun"):
        return
    for fact, variable in GENERIC.items():
        if variable in environ and fact in facts and _number(environ, variable) != facts[fact]:
            raise ConfigError(
                f"The variables of {name} contradict {variable}={environ[variable]}: {_listed(environ)}. "
                f"Unset {variable}, or start the processes with the launcher that {variable} belongs to."
            )


def _master(name: LauncherName, facts: Mapping[str, int], environ: Mapping[str, str], agree: Agree) -> tuple[str, int]:
    """Address and port at which rank 0 listens; derived from the job where the launcher does not tell."""
    address = environ.get("MASTER_ADDR", "")
    if not address and name == "srun":
        address = first_host(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "")))
    if not address and facts["world_size"] == facts.get("local_world_size", 1 if name != "environment" else 0):
        address = "127.0.0.1"
    if not address and name == "mpirun":
        address, port = agree(facts["world_size"])
        return address, _number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else port
    if not address:
        raise ConfigError(
            f"{name} starts {facts['world_size']} processes on several machines but MASTER_ADDR is not set "
            f"({_listed(environ)}): export MASTER_ADDR=<host of rank 0>."
        )
    if "MASTER_PORT" in environ:
        return address, _number(environ, "MASTER_PORT")
    # every process of a job must find the same port, a neighbour job or a requeue another one
    job = "-".join(
        environ.get(variable, "") for variable in ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID")
    )
    job += "-" + "-".join(environ.get(variable, "") for variable in ("SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return address, FIRST_PORT + zlib.crc32(job.encode()) % NUM_PORTS


def first_host(hosts: str) -> str:
    """First name of a Slurm host list: ``gpu[03-07,9],login`` gives ``gpu03``."""
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
