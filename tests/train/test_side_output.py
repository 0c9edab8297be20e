"""An output that fails is reported once and training goes on; a callback that the run depends on ends it."""

import io
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from step_reports import step_report

from aki_megatron.console import IsolatedConsole
from aki_megatron.supervise.evaluations import Evaluation
from aki_megatron.supervise.events import EventLog, read_events
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.validations import ValidationReport
from aki_megatron.train.callbacks import (
    ConsoleCallback,
    LogCallback,
    MetricsCallback,
    ProgressCallback,
    ReportCallback,
    RunFinalizer,
    TensorBoardCallback,
)
from aki_megatron.train.checkpoint_callback import CheckpointCallback
from aki_megatron.train.evaluations import EvaluationCallback
from aki_megatron.train.loop import Callback
from aki_megatron.train.main import LogFileHandler
from aki_megatron.train.sample_audit import SampleAuditCallback
from aki_megatron.train.side_output import OutputFailures, SideOutput, isolate_side_outputs
from aki_megatron.train.validation_log import ValidationLogCallback
from aki_megatron.train.wandb_callback import WandbCallback
from aki_megatron.types import StepReport

METHODS: dict[str, Callable[[Callback], None]] = {
    "on_start": lambda callback: callback.on_start(0),
    "on_step": lambda callback: callback.on_step(1, step_report()),
    "on_validation": lambda callback: callback.on_validation(1, ValidationReport({}, 0, 0.0)),
    "on_evaluation": lambda callback: callback.on_evaluation(1, Evaluation(1, "step_000001", {"POPE": 1.0})),
    "on_step_end": lambda callback: callback.on_step_end(1, step_report()),
    "on_rollback": lambda callback: callback.on_rollback(0),
    "on_stop": lambda callback: callback.on_stop(1),
    "on_end": lambda callback: callback.on_end(1),
}


def test_the_run_depends_on_these_callbacks_only() -> None:
    """Whatever else is added to build.py is isolated."""
    required = {ProgressCallback, MetricsCallback, SampleAuditCallback, CheckpointCallback, RunFinalizer}
    required.add(ValidationLogCallback)
    others = {
        EvaluationCallback,
        ConsoleCallback,
        LogCallback,
        TensorBoardCallback,
        WandbCallback,
        ReportCallback,
        Callback,
    }
    assert all(callback.required for callback in required) and not any(callback.required for callback in others)


@pytest.mark.parametrize("method", METHODS)
def test_a_failed_output_is_reported_once_and_not_called_again(method: str, tmp_path: Path) -> None:
    calls: list[str] = []

    class Fragile(Callback):
        def on_failure(self) -> None:
            calls.append("on_failure")
            raise ValueError("cannot even clean up")

    def fail(self: Callback, *_: object) -> None:
        calls.append(method)
        raise ConnectionResetError("Connection lost")

    setattr(Fragile, method, fail)
    paths, out = RunPaths(tmp_path), io.StringIO()
    failures = OutputFailures(lambda: 7, EventLog(paths).record, IsolatedConsole(out, width=200))
    (callback,) = isolate_side_outputs([Fragile()], failures.report)
    assert isinstance(callback, SideOutput)
    for _ in range(3):
        for run in METHODS.values():
            run(callback)
    assert calls == [method, "on_failure"]
    (event,) = read_events(paths)
    text = "Fragile is off until the next start: ConnectionResetError: Connection lost"
    assert (event["step"], event["kind"], event["text"]) == (7, "output_failed", text)
    assert out.getvalue() == f"training goes on after step 7, but {text}\n"


def test_a_required_callback_ends_the_run() -> None:
    class Needed(Callback):
        required = True

        def on_step(self, step: int, report: StepReport) -> None:
            raise OSError("needed")

    (callback,) = isolate_side_outputs([Needed()], lambda text: None)
    with pytest.raises(OSError, match="needed"):
        callback.on_step(1, step_report())


def test_a_console_that_fails_is_recorded(tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    paths, console = RunPaths(tmp_path), IsolatedConsole(Closed())
    console.on_failure = OutputFailures(lambda: 3, EventLog(paths).record, console).report_console
    callback = ConsoleCallback(5, 1, console)
    callback.on_start(0)
    for step in range(1, 6):
        callback.on_step(step, step_report())
    (event,) = read_events(paths)
    assert event["kind"] == "output_failed" and "BrokenPipeError" in event["text"]


def test_events_wait_for_room(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    log = EventLog(paths)
    paths.events.mkdir()  # cannot be written
    log.record(1, "save", "one")
    log.record(2, "save", "two")
    paths.events.rmdir()
    log.record(3, "save", "three")
    assert [event["text"] for event in read_events(paths)] == ["one", "two", "three"]


def test_foreign_text_reaches_the_console_as_it_is() -> None:
    out = io.StringIO()
    text = "1 bad sample in 9: row [/INST] of [red]data[/red]: :smile:"
    LogCallback(lambda: text, IsolatedConsole(out, width=200)).on_step(4, step_report())
    assert out.getvalue() == f"step 4: {text}\n"


def test_a_log_on_a_full_disk_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler = LogFileHandler("/dev/full")
    for number in range(3):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, f"record {number}", None, None))
    errors = capsys.readouterr().err
    assert errors.count("/dev/full cannot be written to") == 1 and "Traceback" not in errors
