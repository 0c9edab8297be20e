"""Comparison of two runs: tools/compare_runs.py does what its help says."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from step_reports import step_report

from aki_megatron.data.loader import LoadedStep
from aki_megatron.supervise.metrics import metrics_of
from aki_megatron.train.sample_audit import SampleAuditCallback
from tools import compare_runs

REPORT = step_report(2.0)


def write_run(
    run: Path,
    steps: int = 5,
    *,
    replicas: int = 1,
    other: int = 0,
    losses: dict[int, float] | None = None,
    seed: int = 1,
) -> Path:
    """Write a run folder; the step ``other`` has another sample, ``losses`` are those of some steps."""
    loaded: list[LoadedStep] = []
    callbacks = [
        SampleAuditCallback(run / "sample_audit", lambda: loaded[-1], data_rank=n, data_size=replicas)
        for n in range(replicas)
    ]
    for callback in callbacks:
        callback.on_start(0)
    lines = []
    for step in range(1, steps + 1):
        hashes = [2**63 + step * 7919, 2**63 + step + (step == other)]
        for rank, callback in enumerate(callbacks):
            loaded.append(LoadedStep([], sum(hashes[rank::replicas]) % 2**64, 8 // replicas, {}))
            callback.on_step(step, REPORT)
        loss = (losses or {}).get(step, 2.0)
        lines.append(metrics_of(step, replace(REPORT, loss=loss, skipped=loss != loss)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.yaml").write_text(
        f"run: {{dir: {run}}}\ntrain: {{seed: {seed}}}\ndata:\n  sources: [{{name: vsr}}]\n"
    )
    return run


def compared(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    code = compare_runs.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, re.sub(r"\s+", " ", captured.out + captured.err)


def test_equal_runs_are_equal_whatever_their_number_of_replicas(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", replicas=2)
    code, text = compared(capsys, a, b)
    assert code == 0, text
    assert "equal in all 5 steps that both have (40 samples)" in text and "result equal" in text
    assert "run.dir: A " in text  # shown, but not a difference


def test_the_first_step_with_other_samples_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", replicas=2, other=3)
    code, text = compared(capsys, a, b, "--only", "samples")
    assert code == 1
    assert "diverge at step 3" in text and "Steps 1 to 2 are equal" in text
    assert "Of the 2 steps after it 2 are equal" in text and "result different: samples" in text


def first_version(run: Path, steps: int) -> None:
    """Make the first lines of an audit log those of an earlier release."""
    for path in (run / "sample_audit").iterdir():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*(line.replace('"hash_version": 2, ', "") for line in lines[:steps]), *lines[steps:]]))


def test_hashes_of_two_versions_are_not_comparable_rather_than_different(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    first_version(a, 2)
    code, text = compared(capsys, a, b, "--only", "samples")
    assert code == 2 and "The samples of 2 steps cannot be compared, from step 1 on: the audit log of A has" in text
    assert "version 1 there, that of B of version 2" in text and "The 3 other steps are equal" in text
    first_version(b, 2)  # both went on with a later release after step 2
    assert compared(capsys, a, b, "--only", "samples")[0] == 0
    differing = write_run(tmp_path / "c", other=4)
    code, text = compared(capsys, a, differing, "--only", "samples")
    assert code == 1 and "diverge at step 4" in text and "Steps 3 to 3 are equal" in text


def test_a_run_that_ends_earlier_is_different(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=3)
    code, text = compared(capsys, a, b, "--only", "samples")
    assert code == 1 and "equal in all 3 steps" in text and "B ends after step 3, the other after 5" in text


def test_metrics_past_the_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", losses={2: 2.00001, 4: 2.2})
    code, text = compared(capsys, a, b, "--only", "metrics")
    assert code == 1
    assert "largest relative difference 0.091 at step 4 (A 2, B 2.2); step 4 is the first past 0.0001" in text
    assert "grad_norm equal in all 5 steps" in text
    assert compared(capsys, a, b, "--only", "metrics", "--tolerance", "0.1")[0] == 0
    assert "step 2 is the first past 1e-06" in compared(capsys, a, b, "--only", "metrics", "--tolerance", "1e-6")[1]


def test_a_step_that_only_one_run_skipped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", losses={2: float("nan")})
    code, text = compared(capsys, a, b, "--only", "metrics")
    assert code == 1 and "difference inf at step 2 (A 2, B skipped)" in text
    assert compared(capsys, b, b)[0] == 0


def test_keys_that_differ_and_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=2)
    path = b / "config.yaml"
    path.write_text(path.read_text().replace("{name: vsr}", "{name: vsr, weight: 2}"))
    assert compare_runs.main([str(a), str(b), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    config = next(comparison for comparison in found["comparisons"] if comparison["part"] == "config")
    assert config["values"] == {"train.seed": [1, 2], "data.sources.0.weight": [None, 2]}
    assert [comparison["part"] for comparison in found["comparisons"] if comparison["equal"]] == [
        "samples", "loss", "grad_norm", "config",
    ]  # fmt: skip


def test_missing_files_are_a_mistake_in_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for path in (b / "sample_audit").iterdir():
        path.unlink()
    code, text = compared(capsys, a, b)
    assert code == 2 and "has no sample audit log" in text and "--only" in text
    assert compared(capsys, a, b, "--only", "metrics", "config")[0] == 0
    code, text = compared(capsys, a, tmp_path / "c")
    assert code == 2 and "is not a folder" in text


@pytest.mark.parametrize(
    "bad", [b"\xff\x00\n", b"[]\n", b"{}\n", b'{"step": 3, "loss": "high", "replicas": "1"}\n', b"{" * 5000 + b"\n"]
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "sample_audit/replica_0.jsonl", "config.yaml"])
def test_damaged_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture, name: str, bad: bytes) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    with (b / name).open("ab") as file:
        file.write(bad)
    part = {"metrics.jsonl": "metrics", "config.yaml": "config"}.get(name, "samples")
    code, text = compared(capsys, a, b, "--only", part)
    assert code == 2 and text.startswith(f"error: {b / name}") and "Traceback" not in text, text
