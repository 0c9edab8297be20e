"""A run on several processes by any launcher equals the run of one process, and resumes under any other layout."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from launchers import MPIRUN_ENVIRONMENT, launcher_command
from small_demo import ROOT, DemoWorkspace

from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.config.load import load_run
from aki_megatron.console import IsolatedConsole
from aki_megatron.supervise.progress import ProgressTracker
from aki_megatron.supervise.signals import StopSignals

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STEPS = 10
RESUMED_AFTER = 4
PARALLEL = ("--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.zero_stage", "3")
SINGLE = ("--parallel.tensor", "1", "--parallel.pipeline", "1", "--parallel.zero_stage", "1")


def sft(demo: DemoWorkspace, run: str, *layout: str) -> list[str]:
    """Return the launcher and its flags, on this folder's data; ``layout`` comes last and may override any flag."""
    return [
        str(ROOT / "launcher/sft.py"), "--config", str(ROOT / "configs/demo/sft.yaml"), *demo.data_flags(),
        "--init.weights", str(demo.folder / "pretrain"), "--train.precision", "fp32", "--train.global_batch_size", "16",
        "--train.steps", str(STEPS), "--run.dir", str(demo.folder / run),
        "--checkpoint.interval", str(RESUMED_AFTER), "--checkpoint.keep_last", "3", *layout,
    ]  # fmt: skip


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(got: Path, want: Path) -> None:
    """Check that every step appears once, counts are equal, and losses and norms agree to 1e-4."""
    found, expected = metrics(got), metrics(want)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for name in ("supervised_tokens", "tokens", "images", "lr", "skipped"):
        assert [line[name] for line in found] == [line[name] for line in expected], name
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in expected], rel=1e-4, abs=0), name
        difference = max(abs(a[name] / b[name] - 1) for a, b in zip(found, expected, strict=True))
        print(f"{got.name}: {name} differs by at most {difference:.1e}")


@pytest.fixture(scope="module")
def single(demo: DemoWorkspace) -> Path:
    """Train in one process."""
    demo.run(*launcher_command("torchrun", 1), *sft(demo, "one", *SINGLE))
    return demo.folder / "one"


@pytest.fixture(scope="module")
def parallel(demo: DemoWorkspace) -> tuple[Path, str]:
    """Train in eight processes: 2 tensor x 2 pipeline x 2 data ranks, ZeRO-3; return folder and output."""
    printed = demo.run(*launcher_command("torchrun", 8), *sft(demo, "torchrun", *PARALLEL)).stdout
    return demo.folder / "torchrun", printed


def test_torchrun(single: Path, parallel: tuple[Path, str]) -> None:
    run, printed = parallel
    assert_same(run, single)
    assert sorted(log.name for log in (run / "logs").iterdir()) == [f"rank_{rank}.log" for rank in range(8)]
    assert (run / "DONE").read_text() == f"{STEPS}\n"
    elements = sum(spec.numel for spec in CheckpointSource(single).specs.values())
    assert f"model: {elements:,} parameters" in printed, "of the whole model, not of a rank's part"
    texts = ["2 data ranks x 1 micro-batch x 8", "tensor 2 x pipeline 2, ZeRO-3", "stages: input embedder + 2", "idle"]
    for text in [*texts, "--train.micro_batch_size 4"]:
        assert text in printed, text


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_other_launchers(demo: DemoWorkspace, single: Path, launcher: str) -> None:
    command = launcher_command(launcher, 4)
    environment = demo.environment | (MPIRUN_ENVIRONMENT if launcher == "mpirun" else {})
    DemoWorkspace(demo.folder, environment).run(*command, *sft(demo, launcher, *PARALLEL))
    assert_same(demo.folder / launcher, single)


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(3, ("--parallel.pipeline", "3", "--parallel.zero_stage", "1")), (2, ("--parallel.tensor", "2"))],
    ids=["another pipeline", "no pipeline"],
)
def test_resumes_under_another_layout(
    demo: DemoWorkspace, single: Path, parallel: tuple[Path, str], processes: int, layout: tuple[str, ...]
) -> None:
    """Resume as if the eight processes had been killed some steps after a checkpoint."""
    run = demo.folder / f"again_{processes}"
    shutil.copytree(parallel[0], run)
    (run / "DONE").unlink()
    for checkpoint in (run / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > RESUMED_AFTER:
            shutil.rmtree(checkpoint)
    printed = demo.run(*launcher_command("torchrun", processes), *sft(demo, run.name, *layout)).stdout
    assert f"resuming after step {RESUMED_AFTER}" in printed
    assert_same(run, single)


def num_loaded_batches(topology, flags: list[str]) -> tuple[bool, int]:
    """Return whether this rank opens the data, and how many micro-batches it loads for a step."""
    from aki_megatron.train import build

    config = load_run(flags, default_config=Path(flags[1]), prog="sft.py", description="")
    with patch.object(build, "build_step_loader", wraps=build.build_step_loader) as opened:
        trainer = build.build_trainer(
            config,
            topology,
            IsolatedConsole(quiet=True),
            attempt="test",
            stop_signals=StopSignals(),
            tracker=ProgressTracker(config.watch),
        )
    try:
        return opened.called, len(next(trainer.loader.steps(0, None)).batches)
    finally:
        trainer.loader.close()


def test_one_tensor_rank_of_the_first_stage_reads_data(run_on, demo: DemoWorkspace) -> None:
    config = ROOT / "configs/demo/sft.yaml"
    flags = ["--config", str(config), *sft(demo, "reading", *PARALLEL, "--train.micro_batch_size", "4")[3:]]
    (demo.folder / "reading").mkdir()
    assert run_on(8, num_loaded_batches, flags, tensor=2, pipeline=2) == [(True, 2), (False, 0)] * 2 + [(False, 0)] * 4
