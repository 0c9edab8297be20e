"""The ledger: one line per step and replica, whatever stop_signals the run and however many replicas there are."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from aki_megatron.data.loader import LoadedStep
from aki_megatron.errors import DataError
from aki_megatron.train.sample_audit import WORD, SampleAuditCallback, read_ledger
from aki_megatron.types import StepReport

REPORT = StepReport(
    loss=1.0,
    grad_norm=1.0,
    lr=1e-3,
    supervised_tokens=7,
    tokens=40,
    places=50,
    images=2,
    bad_samples=0,
    seconds=0.5,
    skipped=False,
)


def shares(step: int, replicas: int) -> list[int]:
    """Eight samples of a step, dealt to replicas: their hashes, summed by replica. Big enough to pass 2^64."""
    draws = random.Random(step)
    hashes = [draws.getrandbits(64) for _ in range(8)]
    return [sum(hashes[replica::replicas]) % WORD for replica in range(replicas)]


def attempt(run: Path, replicas: int, start: int, end: int, *, killed_at: Sequence[int] | None = None) -> None:
    """One attempt of a run, from after step ``start``; each replica may have died after another step."""
    loaded: list[LoadedStep] = []
    callbacks = [
        SampleAuditCallback(run / "ledger", lambda: loaded[-1], data_rank=rank, data_size=replicas)
        for rank in range(replicas)
    ]
    for hook in callbacks:
        hook.on_start(start)
    for step in range(start + 1, end + 1):
        for rank, hook in enumerate(callbacks):
            if killed_at is None or step <= killed_at[rank]:
                loaded.append(LoadedStep([], shares(step, replicas)[rank], 8 // replicas, {}))
                hook.after_step(step, REPORT)
    if killed_at is None:
        for hook in callbacks:
            hook.on_end(end)


def expected(end: int) -> dict[int, tuple[int, int]]:
    return {step: (8, shares(step, 1)[0]) for step in range(1, end + 1)}


def test_a_line_says_what_one_replica_consumed(tmp_path: Path) -> None:
    hook = SampleAuditCallback(tmp_path / "ledger", lambda: LoadedStep([], 255, 3, {}), data_rank=1, data_size=2)
    hook.on_start(0)
    hook.after_step(1, REPORT)
    # not closed: the line is with the operating system already
    line = (tmp_path / "ledger" / "replica_1.jsonl").read_text()
    assert line == '{"step": 1, "replicas": 2, "samples": 3, "consumed": "00000000000000ff"}\n'


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_sum_does_not_depend_on_the_number_of_replicas(tmp_path: Path, replicas: int) -> None:
    attempt(tmp_path, replicas, 0, 5)
    assert read_ledger(tmp_path) == expected(5)


def test_every_step_is_held_once_through_kills_and_other_sizes(tmp_path: Path) -> None:
    attempt(tmp_path, 4, 0, 9, killed_at=[9, 7, 8, 9])
    replica = tmp_path / "ledger" / "replica_2.jsonl"
    replica.write_text(replica.read_text() + '{"step": 9, "repl')  # cut off in the middle of a line
    attempt(tmp_path, 1, 6, 12, killed_at=[12])
    attempt(tmp_path, 2, 10, 13)
    assert read_ledger(tmp_path) == expected(13)
    lines = [json.loads(line) for path in (tmp_path / "ledger").iterdir() for line in path.read_text().splitlines()]
    assert [sum(line["step"] == step for line in lines) for step in (6, 7, 10, 11)] == [4, 1, 1, 2]


def test_a_negative_twin_another_sample_is_another_sum(tmp_path: Path) -> None:
    attempt(tmp_path, 2, 0, 3)
    path = tmp_path / "ledger" / "replica_1.jsonl"
    path.write_text(path.read_text().replace(f"{shares(2, 2)[1]:016x}", f"{shares(2, 2)[1] ^ 1:016x}"))
    differing = [step for step, value in read_ledger(tmp_path).items() if value != expected(3)[step]]
    assert differing == [2]


def test_steps_that_a_replica_lacks_are_named(tmp_path: Path) -> None:
    attempt(tmp_path, 2, 0, 9)
    path = tmp_path / "ledger" / "replica_1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:4] + lines[7:]))
    with pytest.raises(DataError, match="some twice: steps 3, 5 to 7."):
        read_ledger(tmp_path)
    path.write_text("".join([*lines, lines[3]]))
    with pytest.raises(DataError, match="steps 4."):
        read_ledger(tmp_path)


def test_replicas_that_were_killed_stop_at_different_steps(tmp_path: Path) -> None:
    attempt(tmp_path, 2, 0, 6, killed_at=[6, 4])
    with pytest.raises(DataError, match="steps 5 to 6."):
        read_ledger(tmp_path)
    assert read_ledger(tmp_path, unfinished=True) == expected(4)


def test_a_gap_is_an_error_even_in_an_unfinished_ledger(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 0, 2)
    attempt(tmp_path, 1, 3, 5)
    with pytest.raises(DataError, match="steps 3."):
        read_ledger(tmp_path, unfinished=True)


def test_a_missing_or_damaged_ledger_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no ledger"):
        read_ledger(tmp_path)
    attempt(tmp_path, 1, 0, 2)
    path = tmp_path / "ledger" / "replica_0.jsonl"
    path.write_text(path.read_text() + '{"step": 3}\n')
    with pytest.raises(DataError, match="replica_0.jsonl is no ledger, or was damaged: KeyError"):
        read_ledger(tmp_path)
