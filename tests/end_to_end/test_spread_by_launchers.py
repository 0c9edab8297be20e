"""A run spread over processes by any launcher is the run of one process, and goes on under any other layout."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from launchers import MPIRUN_ENVIRONMENT, launcher_command
from rich.console import Console
from small_demo import ROOT, World

from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.config.load import load_run
from aki_megatron.supervise.signals import StopSignals
from aki_megatron.supervise.watchdog import ProgressTracker

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STEPS = 10
RESUMED_AFTER = 4
SPREAD = ("--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.zero_stage", "3")
ONE = ("--parallel.tensor", "1", "--parallel.pipeline", "1", "--parallel.zero_stage", "1")


def sft(world: World, run: str, *layout: str) -> list[str]:
    """The launcher with a person's flags, on this folder's data; ``layout`` may come last and change anything."""
    return [
        str(ROOT / "launcher/sft.py"), "--config", str(ROOT / "configs/demo/sft.yaml"), *world.data_flags(),
        "--init.weights", str(world.folder / "pretrain"), "--train.precision", "fp32", "--train.global_batch_size", "16",
        "--train.steps", str(STEPS), "--run.dir", str(world.folder / run),
        "--checkpoint.interval", str(RESUMED_AFTER), "--checkpoint.keep_last", "3", *layout,
    ]  # fmt: skip


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(got: Path, want: Path) -> None:
    """Every step once; counts alike, losses and norms to 1e-4 of each other."""
    mine, theirs = metrics(got), metrics(want)
    assert [line["step"] for line in mine] == list(range(1, STEPS + 1))
    for name in ("supervised_tokens", "tokens", "images", "lr", "skipped"):
        assert [line[name] for line in mine] == [line[name] for line in theirs], name
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in mine] == pytest.approx([line[name] for line in theirs], rel=1e-4, abs=0), name
        apart = max(abs(a[name] / b[name] - 1) for a, b in zip(mine, theirs, strict=True))
        print(f"{got.name}: {name} differs by at most {apart:.1e}")


@pytest.fixture(scope="module")
def single(world: World) -> Path:
    """One process, nothing split."""
    world.run(*launcher_command("torchrun", 1), *sft(world, "one", *ONE))
    return world.folder / "one"


@pytest.fixture(scope="module")
def spread(world: World) -> tuple[Path, str]:
    """Eight processes: 2 tensor x 2 pipeline x 2 data ranks, ZeRO-3; and what was printed."""
    printed = world.run(*launcher_command("torchrun", 8), *sft(world, "torchrun", *SPREAD)).stdout
    return world.folder / "torchrun", printed


def test_torchrun(single: Path, spread: tuple[Path, str]) -> None:
    run, printed = spread
    assert_same(run, single)
    assert sorted(log.name for log in (run / "logs").iterdir()) == [f"rank_{rank}.log" for rank in range(8)]
    assert (run / "DONE").read_text() == f"{STEPS}\n"
    elements = sum(fact.elements for fact in CheckpointSource(single).facts.values())
    assert f"model: {elements:,} parameters" in printed, "of the whole model, not of a rank's part"
    for line in ("2 data ranks x 1 micro-batch x 8", "tensor 2 x pipeline 2, ZeRO-3", "cut: front + 2", "idle",
                 "--train.micro_batch_size 4"):  # fmt: skip
        assert line in printed, line


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_other_launchers(world: World, single: Path, launcher: str) -> None:
    command = launcher_command(launcher, 4)
    environment = world.environment | (MPIRUN_ENVIRONMENT if launcher == "mpirun" else {})
    World(world.folder, environment).run(*command, *sft(world, launcher, *SPREAD))
    assert_same(world.folder / launcher, single)


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(3, ("--parallel.pipeline", "3", "--parallel.zero_stage", "1")), (2, ("--parallel.tensor", "2"))],
    ids=["another pipeline", "no pipeline"],
)
def test_goes_on_under_another_layout(
    world: World, single: Path, spread: tuple[Path, str], processes: int, layout: tuple[str, ...]
) -> None:
    """As if the eight processes had been killed after a step that was saved, and some that were not."""
    run = world.folder / f"again_{processes}"
    shutil.copytree(spread[0], run)
    (run / "DONE").unlink()
    for checkpoint in (run / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > RESUMED_AFTER:
            shutil.rmtree(checkpoint)
    printed = world.run(*launcher_command("torchrun", processes), *sft(world, run.name, *layout)).stdout
    assert f"resuming after step {RESUMED_AFTER}" in printed
    assert_same(run, single)


def what_is_read(topology, flags: list[str]) -> tuple[bool, int]:
    """Whether this rank opens the data, and how many micro-batches it loads for a step."""
    from aki_megatron.train import build

    config = load_run(flags, default_config=Path(flags[1]), prog="sft.py", description="")
    with patch.object(build, "build_reading", wraps=build.build_reading) as opened:
        run = build.build_run(
            config,
            topology,
            Console(quiet=True),
            attempt="test",
            stop_signals=StopSignals(),
            pulse=ProgressTracker(config.watch),
        )
    try:
        return opened.called, len(next(run.loader.steps(0, None)).batches)
    finally:
        run.loader.close()


def test_one_tensor_rank_of_the_first_stage_reads_data(run_on, world: World) -> None:
    config = ROOT / "configs/demo/sft.yaml"
    flags = ["--config", str(config), *sft(world, "reading", *SPREAD, "--train.micro_batch_size", "4")[3:]]
    (world.folder / "reading").mkdir()
    assert run_on(8, what_is_read, flags, tensor=2, pipeline=2) == [(True, 2), (False, 0)] * 2 + [(False, 0)] * 4
