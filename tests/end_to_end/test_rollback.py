"""Data that do harm are left out: the run goes back to a checkpoint and ends as one that never met them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from launchers import launcher_command
from small_demo import World

from aki_megatron.checkpoint import files
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.run_paths import RunPaths, read_metrics
from aki_megatron.train.sample_audit import read_ledger

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

POISONED_SFT = "tests/end_to_end/poisoned_sft.py"
STEPS = 14
HARM = {7: 1e4, 13: float("nan")}
"""A spike of the norm after the checkpoint of step 4; after that of step 8, which is step 11 of the data, no number."""
LEFT_OUT = [5, 6, 7, 12, 13]
KILL = 17
"""Step of the data before the next checkpoint."""


def train(world: World, run: str, ranks: int, *, harm: dict[int, float], omits: Sequence[int], kill: int) -> Path:
    """A run over such data; its folder."""
    changes = {"AKI_TEST_HARM": json.dumps(harm), "AKI_TEST_OMITS": json.dumps(omits), "AKI_TEST_KILL": str(kill)}
    flags = [
        *world.sft_flags(run, steps=STEPS), "--watch.on_non_finite", "rollback", "--watch.on_loss_spike", "rollback",
        "--watch.loss_spike_window", "4", "--watch.loss_spike_factor", "50", "--log.tensorboard", "false",
    ]  # fmt: skip
    command = launcher_command("torchrun", ranks)
    there = World(world.folder, world.environment | changes)
    result = there.run(*command, POISONED_SFT, *flags, ok=not kill)
    assert (result.returncode != 0) == bool(kill), result.stderr
    return world.folder / run


def test_a_run_goes_back_and_leaves_the_harmful_data_out(world: World) -> None:
    train(world, "harmed", 2, harm=HARM, omits=[], kill=KILL)
    folder = RunPaths(world.folder / "harmed")
    assert not folder.done.exists() and files.newest(folder.checkpoints) == folder.checkpoints / "step_000008"
    train(world, "harmed", 2, harm=HARM, omits=[], kill=0)
    events = [(event["step"], event["kind"]) for event in read_events(folder)]
    spike, not_finite = [(7, "spike"), (7, "rollback")], [(10, "non_finite"), (10, "rollback")]
    assert events == [*spike, *not_finite, *not_finite], "the second attempt goes on from step 8 and meets it again"

    whole = train(world, "unharmed", 1, harm={}, omits=LEFT_OUT, kill=0)
    lines, expected = read_metrics(folder.metrics), read_metrics(RunPaths(whole).metrics)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) and folder.done.exists()
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-4), name
    assert read_ledger(folder.path) == read_ledger(whole)
    assert read_events(RunPaths(whole)) == []
