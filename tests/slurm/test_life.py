"""What befalls a run on a cluster, and that nothing of it shows in the end: the templates as they are, on two nodes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from throwaway import PREFLIGHT, STEPS, Cluster, Job, wait_for

from aki_megatron.supervise.run_paths import read_lines
from aki_megatron.train.sample_audit import read_ledger

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]

TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1")
"""Instead of eight ranks on a node, for the sake of this machine's cores."""

SFT = (*TWO_RANKS, "slurm/sft_aki4b.sbatch")
PACE_SECONDS = 1.5
"""Slow enough that the run does not end before Slurm has dealt its blows, which takes it up to half a minute each."""

Submit = Callable[..., Job]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to its end, in one go, on sound nodes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    site, output = cluster.folder / "site.env", folder / "log"
    job = Job(cluster, "", folder / "run", str(output), folder / "orders")
    job.id = cluster.run(
        "sbatch", "--parsable", f"--output={output}", *SFT,
        AKI_SITE=str(site), AKI_CONFIG=str(config), AKI_RUN=str(job.run),
    ).strip()  # fmt: skip
    facts = job.wait_for_end("COMPLETED")
    assert (job.run / "DONE").exists() and facts["Restarts"] == "0" and facts["NumNodes"] == "2", job.explain()
    # the site file of the cluster asks for the pre-flight
    assert "pre-flight: 2 x 1 processes; " in job.log() and "bad node" not in job.log()
    for rank in (0, 1):
        assert (job.folder.logs / f"{job.id}.0" / f"rank_{rank}.out").exists()
    assert job.left_behind() == []
    return job.run


def assert_same(job: Job, undisturbed: Path) -> None:
    """Every step once, of the same samples, with the same loss as if nothing had happened; nobody left behind."""
    assert (job.run / "DONE").exists(), job.explain()
    mine, theirs = (read_lines(run / "metrics.jsonl") for run in (job.run, undisturbed))
    assert [line["step"] for line in mine] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in mine] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    ledger = read_ledger(job.run)
    assert sorted(ledger) == list(range(1, STEPS + 1)) and ledger == read_ledger(undisturbed)
    assert job.left_behind() == []


def test_a_run_survives_what_befalls_its_job(cluster: Cluster, submit: Submit, undisturbed: Path) -> None:
    job = submit(*SFT, seconds=PACE_SECONDS)

    def stop_reason(attempt: int) -> str:
        return next(a.reason for a in job.attempts() if a.name == f"{job.id}.{attempt}" and a.end == "stopped")

    def went_on(attempt: int) -> None:
        job.wait_for_steps(attempt, 3)  # a checkpoint is made every other step
        assert job.steps() < STEPS, "the run ended before the next blow"

    # the time limit is near: the template asks for a warning ten minutes ahead
    job.wait_for_steps(0, 3)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=6")
    wait_for("the warning", lambda: (job.run / f"STOPPED.{job.id}.0").exists(), job.explain)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    went_on(1)
    assert stop_reason(0) == "SIGUSR1" and "asking the ranks to save and stop" in job.log()

    # a job of a partition with more rights wants the nodes
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap=true",
        f"--output={job.output}",
    ).strip()  # fmt: skip
    went_on(2)
    assert stop_reason(1) == "SIGTERM"
    assert Job(cluster, urgent, job.run, job.output, job.orders).facts()["JobState"] == "COMPLETED"

    # a rank is killed
    os.kill(job.rank(1), signal.SIGKILL)
    went_on(3)
    assert "ended without a word" in job.log() and "retry: the attempt failed" in job.log()

    # a node dies, then one falls silent; the job goes on without them
    for attempt, number in ((4, signal.SIGKILL), (5, signal.SIGSTOP)):
        node = job.nodes()[1]
        cluster.strike_node(node, number)
        went_on(attempt)
        assert node not in job.nodes()
        if number == signal.SIGSTOP:
            cluster.strike_node(node, signal.SIGKILL)
        cluster.control("start-node", node)

    job.order(seconds=0)
    facts = job.wait_for_end("COMPLETED")
    assert facts["Restarts"] == "5" and [a.name for a in job.attempts()] == [f"{job.id}.{n}" for n in range(6)]
    assert_same(job, undisturbed)


def test_a_chain_goes_on_where_requeues_are_forbidden(
    cluster: Cluster, config: Path, tmp_path: Path, undisturbed: Path
) -> None:
    run, orders, output = tmp_path / "run", tmp_path / "orders", tmp_path / "%j.log"
    environment = {"AKI_RUN": str(run), "AKI_CONFIG": str(config), "AKI_TEST_ORDERS": str(orders)}
    whole = Job(cluster, "", run, str(output), orders)
    whole.order(seconds=PACE_SECONDS)
    queued = cluster.run("slurm/chain.sh", "4", f"--output={output}", *SFT, **environment).split()[:4]
    stops, crashes, ends, spare = (Job(cluster, number, run, str(output), orders) for number in queued)
    assert {job.facts()["Requeue"] for job in (stops, spare)} == {"0"}

    stops.wait_for_steps(0, 3)
    cluster.run("scancel", "--signal=USR1", stops.id)
    stops.wait_for_end("COMPLETED")
    assert "the next job of the chain goes on" in stops.log()

    crashes.wait_for_steps(1, 3)
    os.kill(crashes.rank(0), signal.SIGKILL)
    crashes.wait_for_end("FAILED")

    ends.wait_for_steps(2, 1)
    ends.order(seconds=0)
    ends.wait_for_end("COMPLETED")
    assert_same(ends, undisturbed)
    assert spare.wait_for_end("CANCELLED")["StartTime"] == spare.facts()["EndTime"], "it never ran"
    assert stops.left_behind() == crashes.left_behind() == []


def test_a_bad_node_is_left_out_a_hanging_rank_named_and_a_person_obeyed(cluster: Cluster, submit: Submit) -> None:
    site = Path(cluster.environment["AKI_SITE"]).with_name(PREFLIGHT)
    job = submit(*SFT, "--watch.step_timeout", "6", seconds=0.2, AKI_SITE=str(site), AKI_TEST_BAD_NODE="127.0.0.1")
    job.wait_for_steps(0, 6)
    assert "bad node 127.0.0.1: process 0: disks: Input/output error" in job.log()
    assert job.facts()["ExcNodeList"] == "127.0.0.1" and "127.0.0.1" not in job.nodes()

    job.order(hang=1)
    wait_for("the hang to be noticed", lambda: job.events("hang"), job.explain)
    job.order(seconds=0.2)
    job.wait_for_steps(1, 1)
    (event,) = job.events("hang")
    assert "rank 1 on " in event and "lags" in event, event
    assert "error on rank 1: hang: " in job.log()
    stacks = [job.folder.hang_stacks(rank).read_text() for rank in (0, 1)]
    assert "in obey" not in stacks[0] and "in obey" in stacks[1]

    (job.run / "STOP").touch()
    assert job.wait_for_end("COMPLETED")["Restarts"] == "2"
    assert not (job.run / "DONE").exists() and "stop-file: " in job.log()
    again = submit(*SFT, AKI_RUN=str(job.run))
    again.wait_for_end("COMPLETED")
    assert "stop-file: " in again.log() and len(job.attempts()) == 2
    assert job.left_behind() == again.left_behind() == []


def test_a_spare_node_serves_a_second_job_is_refused_and_cancel_means_cancel(cluster: Cluster, submit: Submit) -> None:
    site = str(Path(cluster.environment["AKI_SITE"]).with_name(PREFLIGHT))
    job = submit(*SFT, seconds=0.2, AKI_SITE=site, AKI_NODES="1", AKI_TEST_BAD_NODE="127.0.0.1")
    job.wait_for_steps(0, 2)
    assert job.nodes() == ["127.0.0.1", "127.0.0.2"] and job.attempts()[0].world_size == 1
    assert "bad node 127.0.0.1" in job.log() and (job.folder.logs / f"{job.id}.0/preflight/rank_0.json").exists()

    second = submit(*SFT, AKI_RUN=str(job.run))
    second.wait_for_end("FAILED")
    assert f"error: job {job.id} trains {job.run} at this moment" in second.log()

    cluster.run("scancel", job.id)
    wait_for("a graceful stop", lambda: (job.run / f"STOPPED.{job.id}.0").exists(), job.explain)
    # a requeue would bring the job back
    wait_for("the batch script", lambda: "it does not requeue itself" in job.log(), job.explain)
    assert job.wait_for_end("CANCELLED")["Restarts"] == "0"
    assert job.left_behind() == []


def test_a_crash_loop_is_given_up(submit: Submit) -> None:
    job = submit(*SFT, seconds=0)
    job.order(**{"raise": 1})
    facts = job.wait_for_end("FAILED")
    assert facts["Restarts"] == "1"  # the site file of the tests gives up after two attempts
    assert "give up: 2 attempts in a row left no newer checkpoint than that of step 0" in job.log()
    assert "on rank 1: ArithmeticError: the answer is 43" in job.log()
    assert job.left_behind() == []


def test_tasks_of_an_array_are_runs_of_their_own(
    cluster: Cluster, config: Path, submit: Submit, tmp_path: Path
) -> None:
    """The last task of an array has the id of the array: what is done to it must not be done to all."""
    runs = tmp_path / "runs"
    (runs / "pretrain_2").mkdir(parents=True)
    (runs / "pretrain_2/DONE").touch()  # its weights are not asked for
    flags = ("--init.weights", "null", "--train.steps", "12")
    array = submit(
        "--array=3-4", "--nodes=1", "--ntasks-per-node=1", "slurm/section42.sbatch", *flags, seconds=PACE_SECONDS,
        AKI_CONFIG=str(config.parent), AKI_RUN=str(runs),
    )  # fmt: skip
    output = array.output
    lacks, trains = (
        Job(cluster, f"{array.id}_{index}", runs / f"causal_{seed}", output, array.orders)
        for index, seed in ((3, 1), (4, 2))
    )
    lacks.wait_for_end("FAILED")
    assert "causal with seed 1 needs " in Path(output.replace("%j", lacks.facts()["JobId"])).read_text()
    trains.wait_for_steps(0, 3)
    assert trains.facts()["JobId"] == array.id
    cluster.run("scancel", "--signal=USR1", trains.id)
    trains.wait_for_steps(1, 1)
    trains.order(seconds=0)
    assert trains.wait_for_end("COMPLETED")["Restarts"] == "1" and lacks.facts()["Restarts"] == "0"
    assert [line["step"] for line in read_lines(trains.folder.metrics)] == list(range(1, 13))
