"""A run that goes on with other settings: what is refused, what is said, and what is recorded."""

import json
from pathlib import Path

import pytest

from aki_megatron.checkpoint import files
from aki_megatron.config.changes import Change
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import dump_run, load_saved
from aki_megatron.errors import ConfigError
from aki_megatron.supervise.events import read_events, record_event
from aki_megatron.supervise.exit_codes import USER_ERROR
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.signals import StopSignals
from aki_megatron.train import main as train_main
from aki_megatron.train.build import build_lr_schedule
from aki_megatron.train.cli import run_launcher
from aki_megatron.train.continuation import check_continuation, reason_not_to_start, record_configuration

SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"
STEPS = 400


def config(folder: Path, *flags: str) -> RunConfig:
    argv = ["--config", str(SFT), "--run.dir", str(folder), "--train.steps", str(STEPS), *flags]
    return load_run(argv, default_config=SFT, prog="sft.py", description="")


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run of STEPS steps that has done as many as its newest checkpoint says."""
    paths = RunPaths(tmp_path / "run")
    checkpoint = paths.checkpoints / f"step_{STEPS:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / files.EXTRA).write_text(json.dumps({"step": STEPS, "data_step": STEPS}))
    monkeypatch.setattr(files, "latest_checkpoint", lambda folder: checkpoint)
    paths.config.write_text(dump_run(config(paths.path)))
    return paths


def test_a_done_run_with_the_same_flags_has_nothing_to_do(paths: RunPaths) -> None:
    paths.done.write_text(f"{STEPS}\n")
    for flags in ((), ("--log.interval", "3")):
        reason = check_continuation(paths, config(paths.path, *flags), ())
        assert "is done already" in reason and "--allow_change train.steps" in reason


def test_a_done_run_with_other_flags_says_so(paths: RunPaths) -> None:
    paths.done.write_text(f"{STEPS}\n")
    with pytest.raises(ConfigError, match="done already") as caught:
        check_continuation(paths, config(paths.path, "--train.steps", "500"), ())
    assert "train.steps was 400 when the run started and is 500 now" in str(caught.value)
    assert "--allow_change train.steps." in str(caught.value)
    assert check_continuation(paths, config(paths.path, "--train.steps", "500"), ("train.steps",)) == ""


def test_a_change_that_would_do_nothing_is_refused(paths: RunPaths) -> None:
    paths.done.write_text(f"{STEPS}\n")
    with pytest.raises(
        ConfigError, match=r"optimizer\.lr can change nothing; to train on, add --allow_change train\.steps"
    ):
        check_continuation(paths, config(paths.path, "--optimizer.lr", "1e-3"), ("optimizer.lr",))


def test_fewer_steps_than_are_done(paths: RunPaths) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps=300 is less than the 400 steps that are done"):
        check_continuation(paths, config(paths.path, "--train.steps", "300"), ("train.steps",))


def test_an_allowed_change_after_it_was_made_is_the_same_run(paths: RunPaths) -> None:
    paths.config.write_text(dump_run(config(paths.path, "--train.steps", "500")))
    assert check_continuation(paths, config(paths.path, "--train.steps", "500"), ("train.steps",)) == ""
    with pytest.raises(ConfigError, match="holds another run"):
        check_continuation(paths, config(paths.path), ())


def test_a_stopped_run_is_not_started(paths: RunPaths) -> None:
    assert reason_not_to_start(paths) == ""
    paths.stop.touch()
    assert "was stopped by a user" in reason_not_to_start(paths)


def test_a_change_is_recorded_with_its_learning_rate(paths: RunPaths) -> None:
    paths.done.write_text(f"{STEPS}\n")
    longer = config(paths.path, "--train.steps", "800", "--optimizer.lr", "1e-3")

    def record(run: RunConfig) -> list[str]:
        return record_configuration(
            paths,
            run,
            step=STEPS,
            learning_rate=lambda run: build_lr_schedule(run)(STEPS),
            record_event=lambda step, kind, text: record_event(paths, step, kind, text),
        )

    lines = record(longer)
    old = load_run(["--config", str(SFT)], default_config=SFT, prog="", description="").optimizer
    assert lines[:2] == [
        "changed after step 400: train.steps from 400 to 800",
        f"changed after step 400: optimizer.lr from {old.lr} to 0.001",
    ]
    assert lines[2] == f"learning rate of step 401: {build_lr_schedule(longer)(STEPS):.6g} instead of {old.min_lr:.6g}"
    assert [(event["step"], event["kind"], event["text"]) for event in read_events(paths)] == [
        (STEPS, "change", line) for line in lines
    ]
    assert not paths.done.exists() and load_saved(paths.config) == longer
    assert record(longer) == [] and len(read_events(paths)) == 3


def test_exit_codes_of_a_done_run(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopSignals, "listen", lambda self: None)
    started = list[RunConfig]()
    monkeypatch.setattr(train_main, "check_before_start", lambda config, launch: started.append(config))
    monkeypatch.setattr(train_main, "train_supervised", lambda *arguments: 7)
    paths.done.write_text(f"{STEPS}\n")
    argv = ["--config", str(SFT), "--run.dir", str(paths.path), "--train.steps"]
    assert run_launcher("sft", [*argv, str(STEPS)], {}) == 0 and started == []
    assert run_launcher("sft", [*argv, "500"], {}) == USER_ERROR and started == []
    assert "error: " in capsys.readouterr().err
    assert run_launcher("sft", [*argv, "500", "--allow_change", "train.steps"], {}) == 7 and len(started) == 1


def test_long_values_that_differ_do_not_look_the_same() -> None:
    """A path differs at its end; where it differs in its middle only, it is shown whole."""
    folder = "/scratch/" + 20 * "project/"
    at_the_end = Change("init.vision", f"{folder}encoder", f"{folder}moved").sentence()
    assert "encoder" in at_the_end and "moved" in at_the_end and len(at_the_end) < 250
    in_the_middle = Change("data.root", f"{folder}run_1/{folder}", f"{folder}run_2/{folder}").short()
    assert "run_1" in in_the_middle and "run_2" in in_the_middle
