"""The two models that the page shows side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from aki_megatron.checkpoint.logits_check import stage_from_tensors
from aki_megatron.config.attention import ATTENTION_RULES, AttentionConfig
from aki_megatron.errors import ConfigError
from aki_megatron.evaluate.model_loading import LoadedModel


@dataclass(frozen=True)
class NamedModel:
    """A model and how requests name it."""

    name: str
    model: LoadedModel

    @property
    def rule(self) -> str:
        """Its attention rule."""
        return self.model.stage.attention.rule

    @property
    def sees_question(self) -> bool:
        """Whether image tokens see the text after them."""
        return ATTENTION_RULES[self.rule].needs_prompt_after_image


@dataclass(frozen=True)
class Comparison:
    """Models side by side, and what a reader must know to compare them."""

    models: Sequence[NamedModel]
    about: str


def compare_rules(named: NamedModel) -> Comparison:
    """Put a model beside itself under another attention rule; both hold the same weights in memory.

    The other rule is causal, or mma for a model that was trained with causal.
    """
    rule = "mma" if named.rule == "causal" else "causal"
    other = NamedModel(f"{named.name} ({rule})", with_attention(named.model, AttentionConfig(rule=rule)))
    about = (
        f"Both columns run the weights of {named.name}, which were trained with the attention rule {named.rule}. The "
        f"second runs them under {rule}: that shows how much they depend on their rule, and is not what a model "
        f"trained with {rule} would answer. For two trained models, start with --compare."
    )
    return Comparison((named, other), about)


def compare_runs(first: NamedModel, second: NamedModel) -> Comparison:
    """Put two trained models side by side. Raises ConfigError where requests could not tell them apart."""
    if first.name == second.name:
        raise ConfigError(f"Both models are named {first.name}; give two different runs.")
    about = (
        f"Two trained models, each under the attention rule that it was trained with: {first.name} ({first.rule}) and "
        f"{second.name} ({second.rule})."
    )
    return Comparison((first, second), about)


def with_attention(model: LoadedModel, attention: AttentionConfig) -> LoadedModel:
    """Return the model under another rule; it shares its weights, but no module, with the one given."""
    config, tensors = model.stage.config, model.stage.state_dict()
    stage = stage_from_tensors(config, range(config.decoder.num_layers), attention, tensors.__getitem__)
    return replace(model, stage=stage.requires_grad_(False).eval())
