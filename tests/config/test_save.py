"""What may change when a run is resumed, what makes it another run, and how a change is recorded."""

from pathlib import Path

import pytest
from demo_runs import load

from aki_megatron.config.changes import CHANGEABLE, MAY_CHANGE, check_progress, read_allow_change
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import check_resume, compare_for_resume, dump_run, load_saved, write_config
from aki_megatron.config.validation import KEYS
from aki_megatron.errors import ConfigError

LOWER = ("--optimizer.lr", "1e-4", "--optimizer.min_lr", "1e-5")


def test_a_run_may_be_resumed_with_other_ranks_and_logs() -> None:
    before = load()
    after = load(
        *("--parallel.zero_stage", "1", "--log.interval", "1", "--checkpoint.interval", "7"),
        *("--train.micro_batch_size", "8", "--run.dir", "elsewhere", "--data.prefetch_steps", "4"),
        *("--watch.on_loss_spike", "rollback"),
    )
    assert compare_for_resume(before, after) == []


def test_a_run_is_not_resumed_as_another_one(tmp_path: Path) -> None:
    before, after = load(), load("--train.seed", "9", "--optimizer.lr", "1e-3", "--model.decoder.num_layers", "5")
    differences = compare_for_resume(before, after)
    assert [change.key for change in differences] == ["model.decoder.num_layers", "train.seed", "optimizer.lr"]
    assert differences[1].sentence() == "train.seed was 2 when the run started and is 9 now"
    saved = tmp_path / "config.yaml"
    check_resume(saved, after)
    saved.write_text(dump_run(before))
    check_resume(saved, before)
    with pytest.raises(
        ConfigError, match=r"holds another run: 3 problems(.|\n)*train\.seed(.|\n)*--run\.dir"
    ) as caught:
        check_resume(saved, after)
    assert "model.decoder.num_layers, train.seed cannot change; the others can, with --allow_change" in str(
        caught.value
    )


def test_changes_that_are_allowed(tmp_path: Path) -> None:
    saved, after = tmp_path / "config.yaml", load(*LOWER, "--train.steps", "900")
    saved.write_text(dump_run(load()))
    with pytest.raises(ConfigError, match=r"--allow_change train\.steps,optimizer\.lr,optimizer\.min_lr\.$"):
        check_resume(saved, after)
    with pytest.raises(ConfigError, match="holds another run: optimizer.lr was"):
        check_resume(saved, after, allow_change=("train.steps", "optimizer.min_lr"))
    for names in (("train.steps", "optimizer"), ("train.steps", "optimizer.lr", "optimizer.min_lr", "data.root")):
        changes = check_resume(saved, after, allow_change=names)
        assert [change.key for change in changes] == ["train.steps", "optimizer.lr", "optimizer.min_lr"]
    assert check_resume(saved, load("--data.root", "/moved"), free=("data.root",)) == []


def test_one_element_of_a_list_is_named(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_run(load("--data.sources", "[{name: vsr}, {name: gqa, weight: 2}]")))
    after = load("--data.sources", "[{name: vsr}, {name: gqa, weight: 3}]")
    with pytest.raises(ConfigError, match=r"data\.sources\[1\]\.weight was 2\.0 when the run started and is 3\.0 now"):
        check_resume(saved, after)


def test_what_is_changed_stays_in_the_file(tmp_path: Path) -> None:
    file, first, second = tmp_path / "config.yaml", load(), load(*LOWER)
    assert write_config(file, first, 0) == [] and load_saved(file) == first
    assert [change.key for change in write_config(file, second, 40)] == ["optimizer.lr", "optimizer.min_lr"]
    assert load_saved(file) == second
    assert write_config(file, second, 50) == []
    longer = load(*LOWER, "--train.steps", "900")
    write_config(file, longer, 60)
    comments = [line for line in file.read_text().splitlines() if line.startswith("# changed: ")]
    assert [line.split(" from ")[0] for line in comments] == [
        "# changed: optimizer.lr",
        "# changed: optimizer.min_lr",
        "# changed: train.steps",
    ]
    assert comments[0].endswith(" to 0.0001 after step 40") and comments[2].endswith(" to 900 after step 60")
    assert load_saved(file) == longer and list(tmp_path.iterdir()) == [file]


IN_LISTS = ("data.captions.shards", "data.sources.path", "data.sources.images")
"""Keys of the entries of a list."""


def test_what_can_change_is_a_key_or_section() -> None:
    for name in (*CHANGEABLE, *MAY_CHANGE):
        is_section = any(key.startswith(f"{name}.") for key in KEYS)
        assert name in KEYS or is_section or name in (*IN_LISTS, "deepspeed"), name
        assert read_allow_change(f" {name},train.steps") == (name, "train.steps")


PHASES = "[{steps: 50, sources: [vsr]}, {steps: 50}]"


def phased(phases: str) -> RunConfig:
    total = sum(int(part.split(",")[0].split("}")[0]) for part in phases.split("steps: ")[1:])
    flags = (
        "--data.sources",
        "[{name: vsr}, {name: gqa}]",
        "--train.steps",
        str(total),
        "--optimizer.warmup_steps",
        "2",
    )
    return load(*flags, "--data.phases", phases)


@pytest.mark.parametrize(
    ("phases", "data_step", "fits"),
    [
        ("[{steps: 50, sources: [vsr]}, {steps: 150}]", 70, True),
        ("[{steps: 50, sources: [vsr]}, {steps: 150}]", 100, True),
        ("[{steps: 50, sources: [vsr]}, {steps: 50}, {steps: 30}]", 100, True),
        ("[{steps: 50, sources: [vsr]}, {steps: 150}]", 103, True),
        ("[{steps: 60, sources: [vsr]}, {steps: 50}]", 40, True),
        ("[{steps: 60, sources: [vsr]}, {steps: 50}]", 60, False),
        ("[{steps: 50, sources: [vsr]}, {steps: 50, sources: [gqa]}]", 50, True),
        ("[{steps: 50, sources: [vsr]}, {steps: 50, sources: [gqa]}]", 51, False),
        ("[{steps: 50, sources: [gqa]}, {steps: 50}]", 10, False),
        ("[{steps: 50, sources: [vsr]}, {steps: 10}, {steps: 50}]", 70, False),
        ("[{steps: 130, sources: [vsr]}]", 70, False),
    ],
)
def test_phases_may_change_from_the_current_step_on(phases: str, data_step: int, fits: bool) -> None:
    before, after = phased(PHASES), phased(phases)
    if fits:
        check_progress(before, after, step=40, data_step=data_step)
    else:
        with pytest.raises(ConfigError, match=r"data\.phases\[[01]\] cannot be changed like this"):
            check_progress(before, after, step=40, data_step=data_step)


def test_a_run_cannot_end_before_its_current_step() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps=100 is less than the 120 steps that are done"):
        check_progress(load(), load("--train.steps", "100", "--optimizer.warmup_steps", "2"), step=120, data_step=120)
    check_progress(load(), load("--train.steps", "120", "--optimizer.warmup_steps", "2"), step=120, data_step=125)
