"""One function tells which process of which world this is, under every launcher."""

import re
import sys

import pytest

from aki_megatron.errors import ConfigError
from aki_megatron.parallel.launch import RESOLVE_SECONDS, Launch, check_master, discover_launch, first_host
from aki_megatron.parallel.mpi import master_over_mpi

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "29500",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "gpu[01-02]",
    "MASTER_PORT": "29500",
}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77"}


@pytest.mark.parametrize(
    ("launcher", "environ", "local_world_size"),
    [("torchrun", TORCHRUN, 2), ("deepspeed", DEEPSPEED, 2), ("mpirun", MPIRUN, 2), ("srun", SRUN, 0)],
)
def test_every_launcher_says_the_same(launcher, environ, local_world_size):
    want = Launch(
        rank=3,
        local_rank=1,
        world_size=4,
        local_world_size=local_world_size,
        launcher=launcher,
        master_address="gpu01",
        master_port=29500,
    )
    assert discover_launch(environ) == want


def test_no_launcher_is_a_world_of_one():
    assert discover_launch({"HOME": "/root"}) == Launch(0, 0, 1, 1, "single")


@pytest.mark.parametrize("environ", [TORCHRUN, SRUN, MPIRUN, BATCH_SCRIPT])
def test_under_slurm_an_attempt_is_named_as_its_batch_script_names_it(environ):
    slurm = {"SLURM_JOB_ID": "77"}
    assert discover_launch(environ | slurm).attempt == "77.0"
    assert discover_launch(environ | slurm | {"SLURM_RESTART_COUNT": "3"}).attempt == "77.3"


def test_elsewhere_an_attempt_has_a_name_of_its_own(monkeypatch):
    one = discover_launch({}).attempt
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert one and discover_launch({}).attempt != one


def test_a_batch_script_without_srun_is_a_world_of_one():
    assert discover_launch(BATCH_SCRIPT).launcher == "single"


def test_launchers_started_by_srun_win_over_it():
    daemon = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    for launcher, environ in (("torchrun", TORCHRUN), ("deepspeed", DEEPSPEED), ("mpirun", MPIRUN)):
        found = discover_launch(daemon | environ)
        assert (found.launcher, found.rank, found.world_size) == (launcher, 3, 4)


@pytest.mark.parametrize("environ", [MPIRUN, SRUN])
def test_variables_by_hand_that_agree_are_fine(environ):
    assert discover_launch(environ | {"RANK": "3", "WORLD_SIZE": "4"}).rank == 3


@pytest.mark.parametrize("environ", [MPIRUN, SRUN])
def test_contradicting_variables_are_listed(environ):
    with pytest.raises(ConfigError, match="RANK=0") as caught:
        discover_launch(environ | {"RANK": "0", "WORLD_SIZE": "4"})
    rank_variable = "OMPI_COMM_WORLD_RANK" if environ is MPIRUN else "SLURM_PROCID"
    assert f"{rank_variable}=3" in str(caught.value) and "WORLD_SIZE=4" in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "without RANK"),
        (TORCHRUN | {"RANK": "three"}, "RANK='three' must be a whole number"),
        (TORCHRUN | {"RANK": "4"}, r"rank 4 must lie in \[0, 4\)"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
    ],
)
def test_broken_environments_are_refused(environ, message):
    with pytest.raises(ConfigError, match=message):
        discover_launch(environ)


def test_mpirun_on_one_machine_needs_no_master():
    one_machine = {name: value for name, value in MPIRUN.items() if not name.startswith("MASTER")}
    one_machine["OMPI_COMM_WORLD_LOCAL_SIZE"] = "4"
    one, other = (discover_launch(one_machine | {"PMIX_NAMESPACE": job}) for job in ("job1", "job2"))
    assert one.master_address == "127.0.0.1"
    assert one.master_port != other.master_port, "two jobs on one machine need different ports"
    assert one == discover_launch(one_machine | {"PMIX_NAMESPACE": "job1", "OMPI_COMM_WORLD_RANK": "3"})


def test_mpirun_on_several_machines_agrees_on_a_master_over_mpi():
    alone = {name: value for name, value in MPIRUN.items() if not name.startswith("MASTER")}
    asked = []

    def find_master(world_size):
        asked.append(world_size)
        return "gpu07", 4321

    found = discover_launch(alone, find_master=find_master)
    assert (found.master_address, found.master_port) == ("gpu07", 4321)
    assert discover_launch(alone | {"MASTER_PORT": "99"}, find_master=find_master).master_port == 99
    assert asked == [4, 4]
    assert discover_launch(MPIRUN, find_master=find_master).master_address == "gpu01", "what a user sets is taken"
    assert (
        discover_launch(alone | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, find_master=find_master).master_address
        == "127.0.0.1"
    )
    assert asked == [4, 4]


def test_without_mpi4py_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match="pip install mpi4py") as caught:
        master_over_mpi(4)
    assert "MASTER_ADDR" in str(caught.value) and "4 processes" in str(caught.value)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu03", "gpu03"), ("gpu[03-07,9],login", "gpu03"), ("a,b", "a"), ("n[1,5]-ib", "n1-ib"), ("", "")],
)
def test_first_host(hosts, first):
    assert first_host(hosts) == first


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED, MPIRUN, SRUN])
@pytest.mark.parametrize("port", ["0", "99999999", "65536", "-1", "x", ""])
def test_ports_that_do_not_exist(environ, port):
    with pytest.raises(ConfigError, match=f"MASTER_PORT='?{port}'? must be") as caught:
        discover_launch(environ | {"MASTER_PORT": port})
    assert "\n" not in str(caught.value)


def test_a_master_that_has_no_address():
    asked, slept = [], []

    def resolve(address, port):
        asked.append((address, port))
        raise OSError("Name or service not known")

    launch = discover_launch(TORCHRUN)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=gpu01 has no address on .*Name or service not known") as caught:
        check_master(launch, resolve=resolve, sleep=slept.append)
    assert "\n" not in str(caught.value) and asked == [("gpu01", 29500)] * RESOLVE_SECONDS
    assert sum(slept) == RESOLVE_SECONDS
    answers = iter([OSError("not yet"), None])

    def resolve_late(address, port):
        if (answer := next(answers)) is not None:
            raise answer

    check_master(launch, resolve=resolve_late, sleep=slept.append)
    check_master(discover_launch(TORCHRUN | {"MASTER_ADDR": "localhost"}))
    check_master(discover_launch({}), resolve=resolve)


def test_a_start_has_one_id_on_all_ranks_and_another_than_others():
    def start_id(**changes):
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "gpu03", "MASTER_PORT": "29500"}
        return discover_launch(variables | changes).start_id

    assert start_id() == start_id(RANK="1", LOCAL_RANK="1") != ""
    assert re.fullmatch(r"gpu03-29500-[0-9a-f]{8}", start_id())
    others = [
        {"MASTER_PORT": "29501"},
        {"MASTER_ADDR": "127.0.0.1"},
        {"SLURM_JOB_ID": "7"},
        {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
        {"TORCHELASTIC_RUN_ID": "a/../b", "TORCHELASTIC_RESTART_COUNT": "0"},
        {"TORCHELASTIC_RUN_ID": "a/../b", "TORCHELASTIC_RESTART_COUNT": "1"},
    ]
    assert len({start_id(), *(start_id(**changes) for changes in others)}) == 1 + len(others)
    assert discover_launch({}).start_id == discover_launch({}).attempt != ""
