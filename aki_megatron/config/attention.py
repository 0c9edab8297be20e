"""The registry of attention rules, and the section of a run that chooses one.

Configuration checks, combination table, documentation, model and export read ATTENTION_RULES; the masks are built in
aki_megatron/attention/rules.py, one builder for each name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from aki_megatron.config.section import Section
from aki_megatron.errors import ConfigError


@dataclass(frozen=True)
class AttentionRule:
    """What the rest of the project needs to know of a rule.

    summary         what a position sees, in one sentence
    look_ahead      what a position may see of later ones: nothing, its own image, or the prompt of its turn
    position_ids    rotary position ids: sequential 0, 1, 2, ..., or concentric inside an image (attention/positions.py)
    options         keys of AttentionConfig that the rule takes
    square_images   whether the latents of an image form a square grid
    export_refusal  why the exported modelling file cannot run the rule; empty where it can
    """

    summary: str
    look_ahead: Literal["none", "image", "prompt"]
    position_ids: Literal["sequential", "concentric"] = "sequential"
    options: tuple[str, ...] = ()
    square_images: bool = False
    export_refusal: str = ""

    @property
    def needs_prompt_after_image(self) -> bool:
        """Whether the rule looks ahead at text, so that text after an image must be a prompt, which is not supervised.

        A rule that looks ahead inside an image at most is legal whatever the text is: no supervised position lies
        between two positions of one image.
        """
        return self.look_ahead == "prompt"


ATTENTION_RULES: dict[str, AttentionRule] = {
    "causal": AttentionRule(summary="Every position sees what precedes it.", look_ahead="none"),
    "mma": AttentionRule(
        summary=(
            "Modality-mutual attention (eq. 5): media positions also see the later prompt text of their turn, "
            "through the assistant marker; everything else is causal."
        ),
        look_ahead="prompt",
        options=("visible_fraction", "selection", "seed"),
    ),
    "mma_general": AttentionRule(
        summary=(
            "Modality-mutual attention of any modalities (eq. 6): inside the prompt of a turn, positions of different "
            "modality see each other both ways; everything else is causal."
        ),
        look_ahead="prompt",
        export_refusal="the modelling file builds the masks of causal and mma only",
    ),
    "mixed": AttentionRule(
        summary="Image positions see their whole image, both ways; everything else is causal.",
        look_ahead="image",
        export_refusal="the modelling file builds the masks of causal and mma only",
    ),
    "cca": AttentionRule(
        summary=(
            "Concentric causal attention (cca-llava): a position of an image sees the rings of its square grid that "
            "are not further in than its own, both ways; everything else is causal."
        ),
        look_ahead="image",
        position_ids="concentric",
        square_images=True,
        export_refusal="the modelling file has neither its masks nor its concentric position ids",
    ),
}
"""Every rule by the name a configuration uses."""

if TYPE_CHECKING:
    RuleName = str
else:
    RuleName = Literal[tuple(ATTENTION_RULES)]


class AttentionConfig(Section):
    """Who may attend to whom: a rule of ATTENTION_RULES and its options."""

    rule: RuleName
    """causal: each position sees what precedes it. mma: media positions also see the prompt of their turn.
    mma_general: modalities of one prompt see each other. mixed: image positions see their whole image. cca: concentric
    causal attention, with its position ids. docs/combinations.md describes them."""
    visible_fraction: float = Field(default=1.0, ge=0, le=1)
    """mma: fraction of the prompt text after the first media item of a turn that its media see; 0 is causal."""
    selection: Literal["prefix", "suffix", "random"] = "prefix"
    """mma: which part of that text: the first tokens, the last ones, or a random subset. A larger fraction contains a
    smaller one."""
    seed: int = Field(default=0, ge=0, lt=1 << 24)
    """mma: seed of the random subset, which depends on it and on the positions inside the sample only."""

    @model_validator(mode="after")
    def _options_of_the_rule(self) -> AttentionConfig:
        taken = ATTENTION_RULES[self.rule].options
        for name in changed_options(self):
            if name not in taken:
                able = [other for other, its in ATTENTION_RULES.items() if name in its.options]
                raise ConfigError(
                    f"attention.{name}={getattr(self, name)} is an option of attention.rule={' or '.join(able)}, but "
                    f"attention.rule={self.rule}; remove it, or set attention.rule to {' or '.join(able)}."
                )
        return self


def changed_options(attention: AttentionConfig) -> list[str]:
    """Options that are not at their default."""
    fields = AttentionConfig.model_fields
    return [name for name, info in fields.items() if name != "rule" and getattr(attention, name) != info.default]


def _join_or(names: Iterable[str]) -> str:
    """``causal, mixed or cca``"""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def rules_for_supervised_text() -> str:
    """The rules that a model may be trained under where text after an image, or all text, is supervised."""
    return _join_or(name for name, rule in ATTENTION_RULES.items() if not rule.needs_prompt_after_image)


def export_refusal(attention: AttentionConfig) -> str:
    """Why the exported modelling file cannot run this rule with these options; empty where it can."""
    if reason := ATTENTION_RULES[attention.rule].export_refusal:
        return f"attention.rule={attention.rule} cannot be exported: {reason}"
    if attention.visible_fraction != 1.0:
        return (
            f"attention.visible_fraction={attention.visible_fraction} cannot be exported: the modelling file lets "
            "images see the whole prompt"
        )
    return ""
