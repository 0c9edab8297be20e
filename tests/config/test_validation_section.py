"""What the section ``validation`` accepts and refuses, and that a run that goes on may change it."""

import pytest
from demo_runs import PRETRAIN, load, message

from aki_megatron.config.save import compare_for_resume

ON = ("--validation.interval", "10")
CAPTIONS = '[{name: val, shards: ["captions/00000.tar"]}]'


def test_validation_is_off_by_default_and_checked_only_when_it_is_on() -> None:
    assert load().validation.interval == 0
    assert load("--validation.captions", CAPTIONS).validation.interval == 0
    assert load(*ON).validation.split == "val"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--validation.captions", CAPTIONS), "remove validation.captions"),
        (("--validation.sources", "[{name: vsr}, {name: vsr}]"), "validation.sources names vsr more than once"),
        (("--validation.split", "test"), "one of val, train"),
        (("--validation.sources", "[{name: nothing}]"), "nothing"),
        (
            ("--validation.generate", "4", "--validation.max_new_tokens", "400"),
            "set validation.max_new_tokens to 375",
        ),
    ],
)
def test_what_cannot_be_validated_is_refused(flags: tuple[str, ...], text: str) -> None:
    assert text in message(*ON, *flags)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ((), "needs validation.captions"),
        (("--validation.captions", CAPTIONS, "--validation.generate", "4"), "data.kind=captions has none; set it to 0"),
        (("--validation.captions", CAPTIONS, "--validation.sources", "[{name: vsr}]"), "remove validation.sources"),
        (("--validation.captions", '[{name: val, shards: [""]}]'), "validation.captions val: shards is empty"),
    ],
)
def test_captions_are_validated_on_captions(flags: tuple[str, ...], text: str) -> None:
    assert text in message(*ON, *flags, config=PRETRAIN)
    assert load(*ON, "--validation.captions", CAPTIONS, config=PRETRAIN).validation.captions[0].name == "val"


def test_a_run_that_goes_on_may_change_its_validation() -> None:
    changed = load(*ON, "--validation.samples", "3", "--validation.sources", "[{name: gqa}]")
    assert compare_for_resume(load(), changed) == []
