"""The sample audit log: one line per step and replica, whatever stops the run and however many replicas there are."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from step_reports import step_report

from aki_megatron.data.loader import LoadedStep
from aki_megatron.data.sample_hash import HASH_VERSION
from aki_megatron.errors import DataError
from aki_megatron.train.sample_audit import MODULUS, SampleAuditCallback, StepSamples, read_sample_audit

REPORT = step_report()


def hash_sums(step: int, replicas: int) -> list[int]:
    """Return the hashes of the eight samples of a step, summed by replica; large enough to exceed 2^64."""
    generator = random.Random(step)
    hashes = [generator.getrandbits(64) for _ in range(8)]
    return [sum(hashes[replica::replicas]) % MODULUS for replica in range(replicas)]


def attempt(run: Path, replicas: int, start: int, end: int, *, killed_at: Sequence[int] | None = None) -> None:
    """Simulate an attempt of a run, from after step ``start``; each replica may have been killed after another step."""
    loaded: list[LoadedStep] = []
    callbacks = [
        SampleAuditCallback(run / "sample_audit", lambda: loaded[-1], data_rank=rank, data_size=replicas)
        for rank in range(replicas)
    ]
    for callback in callbacks:
        callback.on_start(start)
    for step in range(start + 1, end + 1):
        for rank, callback in enumerate(callbacks):
            if killed_at is None or step <= killed_at[rank]:
                loaded.append(LoadedStep([], hash_sums(step, replicas)[rank], 8 // replicas, {}))
                callback.on_step(step, REPORT)
    if killed_at is None:
        for callback in callbacks:
            callback.on_end(end)


def expected(end: int) -> dict[int, StepSamples]:
    return {step: StepSamples(8, hash_sums(step, 1)[0], HASH_VERSION) for step in range(1, end + 1)}


def test_a_line_holds_the_hash_of_one_replica(tmp_path: Path) -> None:
    callback = SampleAuditCallback(
        tmp_path / "sample_audit", lambda: LoadedStep([], 255, 3, {}), data_rank=1, data_size=2
    )
    callback.on_start(0)
    callback.on_step(1, REPORT)
    # before the file is closed
    line = (tmp_path / "sample_audit" / "replica_1.jsonl").read_text()
    assert line == ('{"step": 1, "replicas": 2, "samples": 3, "hash_version": 2, "samples_hash": "00000000000000ff"}\n')


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_sum_does_not_depend_on_the_number_of_replicas(tmp_path: Path, replicas: int) -> None:
    attempt(tmp_path, replicas, 0, 5)
    assert read_sample_audit(tmp_path) == expected(5)


def test_every_step_appears_once_through_kills_and_other_world_sizes(tmp_path: Path) -> None:
    attempt(tmp_path, 4, 0, 9, killed_at=[9, 7, 8, 9])
    replica = tmp_path / "sample_audit" / "replica_2.jsonl"
    replica.write_text(replica.read_text() + '{"step": 9, "repl')  # killed in the middle of a line
    attempt(tmp_path, 1, 6, 12, killed_at=[12])
    attempt(tmp_path, 2, 10, 13)
    assert read_sample_audit(tmp_path) == expected(13)
    lines = [
        json.loads(line) for path in (tmp_path / "sample_audit").iterdir() for line in path.read_text().splitlines()
    ]
    assert [sum(line["step"] == step for line in lines) for step in (6, 7, 10, 11)] == [4, 1, 1, 2]


def test_another_sample_gives_another_sum(tmp_path: Path) -> None:
    attempt(tmp_path, 2, 0, 3)
    path = tmp_path / "sample_audit" / "replica_1.jsonl"
    path.write_text(path.read_text().replace(f"{hash_sums(2, 2)[1]:016x}", f"{hash_sums(2, 2)[1] ^ 1:016x}"))
    differing = [step for step, value in read_sample_audit(tmp_path).items() if value != expected(3)[step]]
    assert differing == [2]


def test_steps_missing_from_a_replica_are_named(tmp_path: Path) -> None:
    attempt(tmp_path, 2, 0, 9)
    path = tmp_path / "sample_audit" / "replica_1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:4] + lines[7:]))
    with pytest.raises(DataError, match="some twice: steps 3, 5 to 7."):
        read_sample_audit(tmp_path)
    path.write_text("".join([*lines, lines[3]]))
    with pytest.raises(DataError, match="steps 4."):
        read_sample_audit(tmp_path)


def test_replicas_that_were_killed_stop_at_different_steps(tmp_path: Path) -> None:
    attempt(tmp_path, 2, 0, 6, killed_at=[6, 4])
    with pytest.raises(DataError, match="steps 5 to 6."):
        read_sample_audit(tmp_path)
    assert read_sample_audit(tmp_path, unfinished=True) == expected(4)


def test_a_gap_is_an_error_even_in_an_unfinished_run(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 0, 2)
    attempt(tmp_path, 1, 3, 5)
    with pytest.raises(DataError, match="steps 3."):
        read_sample_audit(tmp_path, unfinished=True)


def test_a_missing_or_damaged_log_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no sample audit log"):
        read_sample_audit(tmp_path)
    attempt(tmp_path, 1, 0, 2)
    path = tmp_path / "sample_audit" / "replica_0.jsonl"
    path.write_text(path.read_text() + '{"step": 3}\n')
    with pytest.raises(DataError, match=r"replica_0\.jsonl: line 3 is damaged: "):
        read_sample_audit(tmp_path)


def test_replicas_with_hashes_of_two_versions_are_no_step(tmp_path: Path) -> None:
    attempt(tmp_path, 2, 0, 3)
    path = tmp_path / "sample_audit" / "replica_1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2].replace('"hash_version": 2, ', "")]))
    with pytest.raises(DataError, match="steps 3."):
        read_sample_audit(tmp_path)
