"""Bad data are skipped: the run rolls back to a checkpoint and ends as one that never had them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from launchers import launcher_command
from small_demo import DemoWorkspace

from aki_megatron.checkpoint import files
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.sample_audit import read_sample_audit

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

POISONED_SFT = "tests/end_to_end/poisoned_sft.py"
STEPS = 14
FACTORS = {7: 1e4, 13: float("nan")}
"""A spike of the norm after the checkpoint of step 4; a NaN after that of step 8, which is data step 11."""
SKIPPED = [5, 6, 7, 12, 13]
KILL = 17
"""Data step before the next checkpoint."""


def train(
    demo: DemoWorkspace, run: str, ranks: int, *, factors: dict[int, float], omits: Sequence[int], kill: int
) -> Path:
    """Train on such data; return the run paths."""
    changes = {"AKI_TEST_FACTORS": json.dumps(factors), "AKI_TEST_OMITS": json.dumps(omits), "AKI_TEST_KILL": str(kill)}
    flags = [
        *demo.sft_flags(run, steps=STEPS), "--watch.on_non_finite", "rollback", "--watch.on_loss_spike", "rollback",
        "--watch.loss_spike_window", "4", "--watch.loss_spike_factor", "50", "--log.tensorboard", "false",
    ]  # fmt: skip
    command = launcher_command("torchrun", ranks)
    there = DemoWorkspace(demo.folder, demo.environment | changes)
    result = there.run(*command, POISONED_SFT, *flags, ok=not kill)
    assert (result.returncode != 0) == bool(kill), result.stderr
    return demo.folder / run


def test_a_run_rolls_back_and_skips_bad_data(demo: DemoWorkspace) -> None:
    train(demo, "rolled_back", 2, factors=FACTORS, omits=[], kill=KILL)
    paths = RunPaths(demo.folder / "rolled_back")
    assert not paths.done.exists() and files.latest_checkpoint(paths.checkpoints) == paths.checkpoints / "step_000008"
    train(demo, "rolled_back", 2, factors=FACTORS, omits=[], kill=0)
    events = [(event["step"], event["kind"]) for event in read_events(paths)]
    spike, not_finite = [(7, "loss_spike"), (7, "rollback")], [(10, "non_finite"), (10, "rollback")]
    assert events == [*spike, *not_finite, *not_finite], "the second attempt resumes from step 8 and meets it again"

    clean = train(demo, "without_bad_data", 1, factors={}, omits=SKIPPED, kill=0)
    lines, expected = read_metrics(paths.metrics), read_metrics(RunPaths(clean).metrics)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) and paths.done.exists()
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-4), name
    assert read_sample_audit(paths.path) == read_sample_audit(clean)
    assert read_events(RunPaths(clean)) == []
