"""What the section ``evaluate`` accepts and refuses, and that a run that goes on may change it."""

from pathlib import Path

import pytest
from demo_runs import load, message

from aki_megatron.config.save import compare_for_resume

ON = ("--checkpoint.interval", "10", "--checkpoint.keep_every", "20", "--evaluate.interval", "20")


def test_it_is_off_by_default_and_checked_only_when_it_is_on() -> None:
    assert load().evaluate.interval == 0
    run = load(*ON, "--evaluate.command", '[python, "tools/evaluate.py"]', "--evaluate.data", '["/b"]')
    assert run.evaluate.command == ("python", "tools/evaluate.py") and run.evaluate.data == (Path("/b"),)
    assert load("--evaluate.command", "[]").evaluate.command == ()
    assert compare_for_resume(load(), run) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--evaluate.interval", "25"), "must be a multiple of checkpoint.interval=10: what is evaluated are "
                                        "checkpoints; set it to 20"),
        (("--checkpoint.keep_every", "0"), "checkpoint.keep_every=0 may delete a checkpoint of evaluate.interval=20"),
        (("--checkpoint.keep_every", "30"), "set checkpoint.keep_every to 20"),
        (("--evaluate.command", "[]"), "evaluate.command is empty"),
        (("--evaluate.interval", "-1"), "evaluate.interval"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused(flags: tuple[str, ...], said: str) -> None:
    assert said in message(*ON, *flags)
