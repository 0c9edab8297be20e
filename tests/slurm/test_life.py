"""A run on a cluster survives every fault without a change of its result: the templates as they are, on two nodes."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import PREFLIGHT, STEPS, Cluster, Job, wait_for

from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.train.sample_audit import read_sample_audit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]

TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1")
"""Instead of eight ranks per node, because the test machine has few cores."""

SFT = (*TWO_RANKS, "slurm/sft_aki4b.sbatch")
PACE_SECONDS = 1.5
"""Slow enough that the run does not end before Slurm has caused all faults, which takes up to half a minute each."""

Submit = Callable[..., Job]


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run to its end in one attempt, on sound nodes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    site, output = cluster.folder / "site.env", folder / "log"
    job = Job(cluster, "", folder / "run", str(output), folder / "orders")
    job.id = cluster.run(
        "sbatch", "--parsable", f"--output={output}", *SFT,
        AKI_SITE=str(site), AKI_CONFIG=str(config), AKI_RUN=str(job.run),
    ).strip()  # fmt: skip
    info = job.wait_for_end("COMPLETED")
    assert (job.run / "DONE").exists() and info["Restarts"] == "0" and info["NumNodes"] == "2", job.explain()
    # the site file of the cluster asks for the pre-flight
    assert "pre-flight: 2 x 1 processes; " in job.log() and "bad node" not in job.log()
    for rank in (0, 1):
        assert (job.paths.logs / f"{job.id}.0" / f"rank_{rank}.out").exists()
    assert job.left_behind() == []
    return job.run


def assert_same(job: Job, uninterrupted: Path) -> None:
    """Check that every step appears once, with samples and loss of the uninterrupted run, and no process is left."""
    assert (job.run / "DONE").exists(), job.explain()
    found, expected = (read_metrics(run / "metrics.jsonl") for run in (job.run, uninterrupted))
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    audit = read_sample_audit(job.run)
    assert sorted(audit) == list(range(1, STEPS + 1)) and audit == read_sample_audit(uninterrupted)
    assert job.left_behind() == []


def test_a_run_survives_every_fault_of_its_job(cluster: Cluster, submit: Submit, uninterrupted: Path) -> None:
    job = submit(*SFT, seconds=PACE_SECONDS)

    def stop_reason(attempt: int) -> str:
        return next(a.reason for a in job.attempts() if a.name == f"{job.id}.{attempt}" and a.end == "stopped")

    def wait_until_resumed(attempt: int) -> None:
        job.wait_for_steps(attempt, 3)  # a checkpoint is saved every other step
        assert job.steps() < STEPS, "the run ended before the next fault"

    # the time limit is near: the template asks for a warning ten minutes ahead
    job.wait_for_steps(0, 3)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=6")
    wait_for("the warning", lambda: (job.run / f"STOPPED.{job.id}.0").exists(), job.explain)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    wait_until_resumed(1)
    assert stop_reason(0) == "SIGUSR1" and "asking the ranks to save and stop" in job.log()

    # a job of a partition with higher priority needs the nodes
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap=true",
        f"--output={job.output}",
    ).strip()  # fmt: skip
    wait_until_resumed(2)
    assert stop_reason(1) == "SIGTERM"
    first, second, third = job.attempts()
    assert (first.step, second.step) == (second.from_step, third.from_step), (
        "stopped in good order: no step is repeated"
    )
    assert Job(cluster, urgent, job.run, job.output, job.orders).info()["JobState"] == "COMPLETED"

    # a rank is killed
    os.kill(job.rank(1), signal.SIGKILL)
    wait_until_resumed(3)
    assert "ended without an error message" in job.log() and "retry: the attempt failed" in job.log()

    # a node dies, then one stops responding; the job continues without them
    for attempt, number in ((4, signal.SIGKILL), (5, signal.SIGSTOP)):
        node = job.nodes()[1]
        cluster.signal_node(node, number)
        wait_until_resumed(attempt)
        assert node not in job.nodes()
        if number == signal.SIGSTOP:
            cluster.signal_node(node, signal.SIGKILL)
        cluster.control("start-node", node)

    job.order(seconds=0)
    info = job.wait_for_end("COMPLETED")
    assert info["Restarts"] == "5" and [a.name for a in job.attempts()] == [f"{job.id}.{n}" for n in range(6)]
    assert_same(job, uninterrupted)


def test_a_chain_resumes_where_requeues_are_forbidden(
    cluster: Cluster, config: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    run, orders, output = tmp_path / "run", tmp_path / "orders", tmp_path / "%j.log"
    environment = {"AKI_RUN": str(run), "AKI_CONFIG": str(config), "AKI_TEST_ORDERS": str(orders)}
    chain = Job(cluster, "", run, str(output), orders)
    chain.order(seconds=PACE_SECONDS)
    queued = cluster.run("slurm/chain.sh", "4", f"--output={output}", *SFT, **environment).split()[:4]
    stops, crashes, ends, spare = (Job(cluster, number, run, str(output), orders) for number in queued)
    assert {job.info()["Requeue"] for job in (stops, spare)} == {"0"}

    stops.wait_for_steps(0, 3)
    cluster.run("scancel", "--signal=USR1", stops.id)
    stops.wait_for_end("COMPLETED")
    assert "the next job of the chain resumes the run" in stops.log()

    crashes.wait_for_steps(1, 3)
    os.kill(crashes.rank(0), signal.SIGKILL)
    crashes.wait_for_end("FAILED")

    ends.wait_for_steps(2, 1)
    ends.order(seconds=0)
    ends.wait_for_end("COMPLETED")
    assert_same(ends, uninterrupted)
    assert spare.wait_for_end("CANCELLED")["StartTime"] == spare.info()["EndTime"], "it never ran"
    assert stops.left_behind() == crashes.left_behind() == []


def test_a_bad_node_is_excluded_a_hanging_rank_named_and_stop_obeyed(cluster: Cluster, submit: Submit) -> None:
    site = Path(cluster.environment["AKI_SITE"]).with_name(PREFLIGHT)
    job = submit(*SFT, "--watch.step_timeout", "6", seconds=0.2, AKI_SITE=str(site), AKI_TEST_BAD_NODE="127.0.0.1")
    job.wait_for_steps(0, 6)
    assert "bad node 127.0.0.1: process 0: disks: Input/output error" in job.log()
    assert job.info()["ExcNodeList"] == "127.0.0.1" and "127.0.0.1" not in job.nodes()

    job.order(hang=1)
    wait_for("the hang to be detected", lambda: job.events("hang"), job.explain)
    job.order(seconds=0.2)
    job.wait_for_steps(1, 1)
    (event,) = job.events("hang")
    assert "rank 1 on " in event and "straggler" in event, event
    assert "error on rank 1: hang: " in job.log()
    stacks = [job.paths.hang_stacks(rank).read_text() for rank in (0, 1)]
    assert "in follow_orders" not in stacks[0] and "in follow_orders" in stacks[1]

    (job.run / "STOP").touch()
    assert job.wait_for_end("COMPLETED")["Restarts"] == "2"
    assert not (job.run / "DONE").exists() and "stop-file: " in job.log()
    again = submit(*SFT, AKI_RUN=str(job.run))
    again.wait_for_end("COMPLETED")
    assert "stop-file: " in again.log() and len(job.attempts()) == 2
    assert job.left_behind() == again.left_behind() == []


def test_a_spare_node_is_used_a_second_job_refused_and_a_cancelled_job_not_requeued(
    cluster: Cluster, submit: Submit
) -> None:
    site = str(Path(cluster.environment["AKI_SITE"]).with_name(PREFLIGHT))
    job = submit(*SFT, seconds=0.2, AKI_SITE=site, AKI_NODES="1", AKI_TEST_BAD_NODE="127.0.0.1")
    job.wait_for_steps(0, 2)
    assert job.nodes() == ["127.0.0.1", "127.0.0.2"] and job.attempts()[0].world_size == 1
    assert "bad node 127.0.0.1" in job.log() and (job.paths.logs / f"{job.id}.0/preflight/rank_0.json").exists()

    second = submit(*SFT, AKI_RUN=str(job.run))
    second.wait_for_end("FAILED")
    assert f"error: job {job.id} is training {job.run}" in second.log()

    cluster.run("scancel", job.id)
    wait_for("a graceful stop", lambda: (job.run / f"STOPPED.{job.id}.0").exists(), job.explain)
    # a requeue would bring the job back
    wait_for("the batch script", lambda: "it does not requeue itself" in job.log(), job.explain)
    assert job.wait_for_end("CANCELLED")["Restarts"] == "0"
    assert job.left_behind() == []


def test_a_crash_loop_is_given_up(submit: Submit) -> None:
    job = submit(*SFT, seconds=0)
    job.order(**{"raise": 1})
    info = job.wait_for_end("FAILED")
    assert info["Restarts"] == "1"  # the site file of the tests gives up after two attempts
    assert "give up: 2 attempts in a row left no newer checkpoint than that of step 0" in job.log()
    assert "on rank 1: ArithmeticError: the answer is 43" in job.log()
    assert job.left_behind() == []


def test_a_failing_worker_of_the_loader_ends_a_single_rank(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    printed = cluster.run(
        "srun", "--nodes=1", "--ntasks=1", sys.executable, "tests/end_to_end/failing_sft.py", "--config", str(config),
        "--run.dir", str(tmp_path / "run"), "--data.num_workers", "4", ok=False, AKI_TEST_FAILS="0:3:worker",
    )  # fmt: skip
    assert "error: ArithmeticError: the answer is 43\n" in printed, printed
    assert "Exited with exit code 1" in printed, printed
    assert time.time() - (tmp_path / "run/logs/rank_0.log").stat().st_mtime < 60
    wait_for("the end of all processes", lambda: not cluster.processes())


def test_tasks_of_an_array_are_separate_runs(cluster: Cluster, config: Path, submit: Submit, tmp_path: Path) -> None:
    """The last task of an array has the id of the array: an action on it must not affect all tasks."""
    runs = tmp_path / "runs"
    (runs / "pretrain_2").mkdir(parents=True)
    (runs / "pretrain_2/DONE").touch()  # its weights are not read
    flags = ("--init.weights", "null", "--train.steps", "12")
    array = submit(
        "--array=3-4", "--nodes=1", "--ntasks-per-node=1", "slurm/section42.sbatch", *flags, seconds=PACE_SECONDS,
        AKI_CONFIG=str(config.parent), AKI_RUN=str(runs),
    )  # fmt: skip
    output = array.output
    refused, trained = (
        Job(cluster, f"{array.id}_{index}", runs / f"causal_{seed}", output, array.orders)
        for index, seed in ((3, 1), (4, 2))
    )
    refused.wait_for_end("FAILED")
    assert "causal with seed 1 needs " in Path(output.replace("%j", refused.info()["JobId"])).read_text()
    trained.wait_for_steps(0, 3)
    assert trained.info()["JobId"] == array.id
    cluster.run("scancel", "--signal=USR1", trained.id)
    trained.wait_for_steps(1, 1)
    trained.order(seconds=0)
    assert trained.wait_for_end("COMPLETED")["Restarts"] == "1" and refused.info()["Restarts"] == "0"
    assert [line["step"] for line in read_metrics(trained.paths.metrics)] == list(range(1, 13))
