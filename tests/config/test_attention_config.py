"""The attention section: every rule and option by flag, wrong ones refused with the key, the value and the way out."""

from pathlib import Path

import pytest
from demo_runs import PRETRAIN, edited, load, message

from aki_megatron.config.attention import ATTENTION_RULES, AttentionConfig, export_refusal, rules_for_supervised_text
from aki_megatron.config.combinations import AXES, page
from aki_megatron.errors import ConfigError

TEXT_FIRST = ("--data.phases", "[{steps: 1600, order: text_first}]")


@pytest.mark.parametrize("rule", ATTENTION_RULES)
def test_every_rule_is_reached_by_flag_and_by_file(rule: str, tmp_path: Path) -> None:
    assert load("--attention.rule", rule).attention == AttentionConfig(rule=rule)
    assert load(config=edited(tmp_path, {"attention.rule": rule})).attention == AttentionConfig(rule=rule)


def test_options_are_reached_by_flag_and_by_file(tmp_path: Path) -> None:
    wanted = AttentionConfig(rule="mma", visible_fraction=0.25, selection="random", seed=7)
    flags = ("--attention.visible_fraction", "0.25", "--attention.selection", "random", "--attention.seed", "7")
    assert load(*flags).attention == wanted
    file = edited(tmp_path, {"attention": {"rule": "mma", "visible_fraction": 0.25, "selection": "random", "seed": 7}})
    assert load(config=file).attention == wanted


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--attention.rule", "eq5"], [f"attention.rule must be one of {', '.join(ATTENTION_RULES)}", "eq5"]),
        (["--attention.visible_fraction", "1.5"], ["attention.visible_fraction must be", ">= 0 and <= 1", "1.5"]),
        (["--attention.selection", "middle"], ["attention.selection must be one of prefix, suffix, random", "middle"]),
        (["--attention.seed", "-1"], ["attention.seed must be", ">= 0", "-1"]),
        (["--attention.seed", str(1 << 24)], ["attention.seed must be", "< 16777216"]),
        (
            ["--attention.rule", "mixed", "--attention.visible_fraction", "0.5"],
            ["attention.visible_fraction=0.5", "attention.rule=mixed", "set attention.rule to mma"],
        ),
        (
            ["--attention.rule", "causal", "--attention.selection", "suffix"],
            ["attention.selection=suffix", "attention.rule=causal", "remove it"],
        ),
        (
            ["--attention.rule", "cca", "--attention.seed", "3"],
            ["attention.seed=3", "attention.rule=cca", "set attention.rule to mma"],
        ),
        (
            ["--attention.rule", "cca", "--model.resampler.num_latents", "12"],
            ["attention.rule=cca", "model.resampler.num_latents=12", "set it to 9 or 16"],
        ),
    ],
)
def test_wrong_values_and_combinations_are_refused(argv: list[str], fragments: list[str]) -> None:
    text = message(*argv)
    for fragment in fragments:
        assert fragment in text, text


@pytest.mark.parametrize("rule", ATTENTION_RULES)
def test_captions_and_text_first_go_with_rules_that_look_ahead_inside_an_image_at_most(rule: str) -> None:
    if not ATTENTION_RULES[rule].needs_prompt_after_image:
        assert load("--attention.rule", rule, config=PRETRAIN).attention.rule == rule
        assert load("--attention.rule", rule, *TEXT_FIRST).attention.rule == rule
        return
    for text in (message("--attention.rule", rule, config=PRETRAIN), message("--attention.rule", rule, *TEXT_FIRST)):
        assert f"attention.rule={rule}" in text
        assert f"set attention.rule to {rules_for_supervised_text()}" in text


def test_captions_with_a_prefix_go_with_every_rule() -> None:
    for rule in ATTENTION_RULES:
        run = load("--attention.rule", rule, "--data.caption_prefix", "[0.1, 0.5]", config=PRETRAIN)
        assert run.data.caption_prefix == (0.1, 0.5) and run.attention.rule == rule
    assert "data.caption_prefix [0.0, 0.5]" in message("--attention.rule", "mma", config=PRETRAIN)


@pytest.mark.parametrize("limits", ["[0.1]", "[0.5, 0.1]", "[0.0, 1.0]", "[-0.1, 0.5]", "[0.1, 0.2, 0.3]"])
def test_a_prefix_that_is_no_range_of_fractions_is_refused(limits: str) -> None:
    text = message("--attention.rule", "mma", "--data.caption_prefix", limits, config=PRETRAIN)
    assert "data.caption_prefix=[" in text and "must be [low, high] with 0 <= low <= high < 1" in text


def test_a_prefix_belongs_to_captions_after_their_image() -> None:
    assert "is for data.kind=captions" in message("--data.caption_prefix", "[0.0, 0.5]")
    phases = ("--data.phases", "[{steps: 800, order: text_first}]")
    text = message("--data.caption_prefix", "[0.0, 0.5]", *phases, config=PRETRAIN)
    assert "data.caption_prefix makes a prompt of text after an image, but a phase has order=text_first" in text


def test_which_rules_need_a_prompt_after_an_image() -> None:
    expected = {"causal": False, "mma": True, "mma_general": True, "mixed": False, "cca": False}
    assert {rule: ATTENTION_RULES[rule].needs_prompt_after_image for rule in expected} == expected


@pytest.mark.parametrize("rule", ATTENTION_RULES)
def test_export_is_refused_with_the_reason(rule: str) -> None:
    refusal = export_refusal(AttentionConfig(rule=rule))
    assert (rule in ("causal", "mma")) == (refusal == "")
    if refusal:
        assert f"attention.rule={rule} cannot be exported" in refusal
        assert ATTENTION_RULES[rule].export_refusal in refusal


def test_export_of_a_fraction_is_refused() -> None:
    assert "attention.visible_fraction=0.5" in export_refusal(AttentionConfig(rule="mma", visible_fraction=0.5))


def test_a_wrong_option_is_refused_where_the_section_is_built() -> None:
    with pytest.raises(ConfigError, match=r"attention\.visible_fraction=0\.5"):
        AttentionConfig(rule="cca", visible_fraction=0.5)


def test_the_combination_table_and_its_page_read_the_registry() -> None:
    assert AXES["rule"].values == tuple(ATTENTION_RULES)
    text = page()
    for name, rule in ATTENTION_RULES.items():
        assert f"| `{name}` | {rule.summary} |" in text
