"""What a run folder holds decides whether a start goes on, begins, or is refused."""

from pathlib import Path

import pytest

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import dump_run
from aki_megatron.errors import ConfigError
from aki_megatron.supervise.attempts import record_start
from aki_megatron.supervise.events import ignore_event
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.continuation import check_continuation, record_configuration
from aki_megatron.train.history import check_history, read_history, record_saved, with_saved_init
from aki_megatron.train.main import missing_inputs

SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    paths.path.mkdir()
    return paths


def run(paths: RunPaths, *flags: str) -> RunConfig:
    arguments = ["--config", str(SFT), "--run.dir", str(paths.path), *flags]
    return load_run(arguments, default_config=SFT, prog="sft.py", description="")


def begin(paths: RunPaths, config: RunConfig) -> None:
    paths.config.write_text(dump_run(config))


def train(paths: RunPaths, config: RunConfig, *, saved: int | None) -> None:
    """Leave what a run leaves that was killed after step 5, with a checkpoint of step ``saved``."""
    begin(paths, config)
    paths.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    if saved is not None:
        folder = paths.checkpoints / f"step_{saved:06d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "config.yaml").write_text(dump_run(config))
        record_saved(paths, saved)


def record(paths: RunPaths, config: RunConfig, step: int) -> list[str]:
    return record_configuration(paths, config, step=step, learning_rate=lambda run: 0.1, record_event=ignore_event)


def test_a_new_folder_holds_nothing(paths: RunPaths) -> None:
    for folder in (paths, RunPaths(paths.path / "missing")):
        assert read_history(folder).is_empty
        assert check_continuation(folder, run(folder), ()) == ""


def test_what_a_start_that_failed_before_step_1_left_binds_nobody(paths: RunPaths) -> None:
    begin(paths, run(paths))
    paths.metrics.write_text("")
    other = run(paths, "--train.seed", "9")
    assert check_continuation(paths, other, ()) == ""
    assert record(paths, other, 0) == [] and paths.config.read_text() == dump_run(other)
    paths.metrics.write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="holds another run"):
        check_continuation(paths, run(paths), ())


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(paths: RunPaths) -> None:
    config = run(paths)
    train(paths, config, saved=None)
    record_start(paths, "7.0", from_step=0)
    assert check_continuation(paths, config, ()) == ""


@pytest.mark.parametrize("evidence", ["SAVED", "damaged SAVED", "attempts"])
@pytest.mark.parametrize("allow_change", [(), ("train.steps",)])
def test_checkpoints_that_are_away_are_missed(paths: RunPaths, evidence: str, allow_change: tuple[str, ...]) -> None:
    config = run(paths)
    train(paths, config, saved=4)
    assert check_continuation(paths, config, ()) == ""
    paths.checkpoints.rename(paths.path / "elsewhere")
    if evidence == "damaged SAVED":
        paths.saved.write_bytes(b"\xff")
    if evidence == "attempts":
        paths.saved.unlink()
        record_start(paths, "7.1", from_step=4)
    with pytest.raises(ConfigError, match=f"lost its checkpoints.*{paths.checkpoints}.*Bring the folder back"):
        check_continuation(paths, config, allow_change)
    paths.done.touch()
    longer = run(paths, "--train.steps", str(config.train.steps + 10))
    with pytest.raises(ConfigError, match="lost its checkpoints"):
        check_continuation(paths, longer, ("train.steps",))


def test_a_folder_without_config_is_of_the_run_of_its_checkpoint(paths: RunPaths) -> None:
    config = run(paths)
    train(paths, config, saved=4)
    paths.config.unlink()
    assert check_continuation(paths, config, ()) == ""
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"step_000004 holds another run: train\.seed was"):
            check_continuation(paths, run(paths, "--train.seed", "9"), ())
        paths.done.touch()  # a run that is done is not taken for another one either
    assert "is done already" in check_continuation(paths, config, ())


def test_metrics_without_config_are_of_nobody_knows_which_run(paths: RunPaths) -> None:
    train(paths, run(paths), saved=None)
    paths.config.unlink()
    with pytest.raises(ConfigError, match=r"no config\.yaml that tells of which one\. Bring the file back"):
        check_continuation(paths, run(paths), ())


def test_a_checkpoint_of_another_run_is_refused(paths: RunPaths) -> None:
    train(paths, run(paths, "--train.seed", "9"), saved=4)
    begin(paths, run(paths))
    with pytest.raises(ConfigError, match=r"the checkpoint .*step_000004 holds another run"):
        check_continuation(paths, run(paths), ())


def test_checkpoints_from_before_an_allowed_change_are_of_the_same_run(paths: RunPaths) -> None:
    train(paths, run(paths), saved=4)
    changed = run(paths, "--optimizer.lr", "1e-3")
    with pytest.raises(ConfigError, match="--allow_change optimizer.lr"):
        check_continuation(paths, changed, ())
    assert check_continuation(paths, changed, ("optimizer.lr",)) == ""
    assert any("optimizer.lr from" in line for line in record(paths, changed, 4))
    assert check_continuation(paths, changed, ()) == "", "once allowed, it is the run's"
    check_history(paths, changed, ())
    with pytest.raises(ConfigError, match="holds another run"):
        check_continuation(paths, run(paths, "--optimizer.lr", "1e-3", "--train.seed", "9"), ())


def test_a_run_that_goes_on_needs_no_initial_weights(paths: RunPaths) -> None:
    config = run(paths, "--init.weights", "/gone")
    assert any("init.weights" in text for text in missing_inputs(config))
    train(paths, config, saved=4)
    assert not any("init." in text for text in missing_inputs(config))
    without = run(paths, "--init.weights", "null")
    with pytest.raises(ConfigError, match="init.weights was"):
        check_continuation(paths, without, ())
    resumed = with_saved_init(paths, without)
    assert resumed == config and check_continuation(paths, resumed, ()) == ""
    with pytest.raises(ConfigError, match="init.weights was"):
        check_continuation(paths, with_saved_init(paths, run(paths, "--init.weights", "/another")), ())
    paths.config.unlink()
    assert with_saved_init(paths, without) == config
