"""What trains: per part of the model frozen, full or by low-rank adapters, at which learning rate and weight decay."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from aki_megatron.config.section import PositiveInt, Section, Strings
from aki_megatron.errors import ConfigError

LORA_TARGETS: dict[str, tuple[str, int | None]] = {
    "qkv_proj": ("attention.qkv", None),
    "q_proj": ("attention.qkv", 0),
    "k_proj": ("attention.qkv", 1),
    "v_proj": ("attention.qkv", 2),
    "o_proj": ("attention.out", None),
    "gate_up_proj": ("mlp.gate_up", None),
    "gate_proj": ("mlp.gate_up", 0),
    "up_proj": ("mlp.gate_up", 1),
    "down_proj": ("mlp.down", None),
}
"""Linear layer as Hugging Face models and peft name it -> our layer without ``_proj``, and which of the maps that ours
fuses it is (None: all of it)."""


class PartConfig(Section):
    """One part of the model: what trains of it, and how fast. A word alone stands for its mode: ``resampler: full``."""

    mode: Literal["frozen", "full"] = "full"
    """full: every parameter trains. frozen: none does; there is no gradient and no optimizer state of it."""
    lr_factor: PositiveFloat = 1.0
    """Factor from the run's learning rate (optimizer.lr and its schedule) to the part's."""
    weight_decay: NonNegativeFloat | None = None
    """Decoupled weight decay of all parameters of the part; null: optimizer.weight_decay, which embeddings do not
    have."""

    @model_validator(mode="before")
    @classmethod
    def _from_mode(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value

    @property
    def is_frozen(self) -> bool:
        """Whether no parameter of the part trains."""
        return self.mode == "frozen"


class VisionPartConfig(PartConfig):
    """The vision encoder: patch and position embeddings, layers, final norm; its pooling head is never trained."""

    mode: Literal["frozen", "full"] = "frozen"
    """frozen: as in the papers. full: every parameter trains but those of the pooling head, which is not computed."""


class DecoderPartConfig(PartConfig):
    """The decoder's layers."""

    mode: Literal["frozen", "full", "lora"] = "full"  # type: ignore[assignment]  # one more than the other parts
    """full: every parameter of the layers trains. frozen: none does. lora: low-rank adapters beside the layers' linear
    maps train (trainable.lora), and the layers themselves do not."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA, Hu et al., 2021), as peft has them; used where the decoder's mode is lora."""

    rank: PositiveInt = 16
    """Rank of each adapter."""
    alpha: PositiveFloat = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters; only 0 is supported."""
    targets: Strings = ()
    """Linear maps that get an adapter, as peft names them: qkv_proj or q_proj, k_proj, v_proj; o_proj; gate_up_proj or
    gate_proj, up_proj; down_proj. Empty: all maps, as the family's Hugging Face model has them."""

    @model_validator(mode="after")
    def _supported(self) -> "LoraConfig":
        if self.dropout:
            raise ConfigError(
                f"trainable.lora.dropout={self.dropout:g} is not supported: equal results under every layout need a "
                "forward pass without random numbers; set it to 0.0."
            )
        if unknown := [name for name in self.targets if name not in LORA_TARGETS]:
            raise ConfigError(
                f"trainable.lora.targets names {', '.join(unknown)}; choose from {', '.join(LORA_TARGETS)}."
            )
        for fused, (layer, part) in LORA_TARGETS.items():
            parts = [n for n in self.targets if LORA_TARGETS[n][0] == layer and n != fused]
            if part is None and fused in self.targets and parts:
                raise ConfigError(
                    f"trainable.lora.targets names {fused} and {', '.join(parts)}, which it contains; keep one of them."
                )
        if twice := sorted({name for name in self.targets if self.targets.count(name) > 1}):
            raise ConfigError(f"trainable.lora.targets names {', '.join(twice)} twice; name each once.")
        return self


class TrainableConfig(Section):
    """What trains, part by part. data.phases may change it from one phase to the next."""

    vision: VisionPartConfig = VisionPartConfig()
    resampler: PartConfig = PartConfig()
    embeddings: PartConfig = PartConfig()
    decoder: DecoderPartConfig = DecoderPartConfig()
    head: PartConfig = PartConfig()
    lora: LoraConfig = LoraConfig()


class PhaseTrainable(Section):
    """What a phase trains: the parts it names are as written here, the others as in the section trainable."""

    vision: VisionPartConfig | None = None
    """Vision encoder; null: as in the section trainable."""
    resampler: PartConfig | None = None
    """Resampler; null: as in the section trainable."""
    embeddings: PartConfig | None = None
    """Token embeddings, added tokens too; null: as in the section trainable."""
    decoder: DecoderPartConfig | None = None
    """Decoder layers; null: as in the section trainable."""
    head: PartConfig | None = None
    """Final norm and LM head; null: as in the section trainable."""


PARTS = tuple(PhaseTrainable.model_fields)
"""The parts of the model that the table names."""


@dataclass(frozen=True)
class PartPlan:
    """What trains of one part in one phase, with ``since``: the phase in which it last began to train."""

    mode: str
    lr_factor: float = 1.0
    weight_decay: float | None = None
    since: int = 0


@dataclass(frozen=True)
class TrainingPlan:
    """What trains in one phase of a run."""

    parts: Mapping[str, PartPlan]
    """A plan for each of PARTS."""
    lora: LoraConfig | None = None
    """Adapters that the decoder holds, whether they train in this phase or not; None: it has none in any phase."""

    def part(self, name: str) -> PartPlan:
        """Return the plan of a part; a part that the table does not name is frozen."""
        return self.parts.get(name, PartPlan("frozen"))

    @property
    def update_counters(self) -> tuple[int, ...]:
        """Phases in which parts that train began to: each has a count of optimizer updates of its own."""
        return tuple(sorted({0} | {part.since for part in self.parts.values() if part.mode != "frozen"}))


def phase_table(table: TrainableConfig, phase: PhaseTrainable) -> dict[str, PartConfig]:
    """Return the parts of a phase: what it says, and where it says nothing what the run says."""
    return {name: getattr(phase, name) or getattr(table, name) for name in PARTS}


def training_plans(table: TrainableConfig, phases: list[PhaseTrainable]) -> tuple[TrainingPlan, ...]:
    """Return the plan of each phase.

    A part that trained in the phase before goes on with its optimizer state; one that was frozen there begins anew.
    """
    tables = [phase_table(table, phase) for phase in phases]
    lora = table.lora if any(parts["decoder"].mode == "lora" for parts in tables) else None
    plans: list[TrainingPlan] = []
    for number, parts in enumerate(tables):
        before = plans[-1].parts if plans else {}
        plan = {}
        for name, part in parts.items():
            goes_on = name in before and before[name].mode != "frozen"
            since = before[name].since if goes_on else number
            plan[name] = PartPlan(part.mode, part.lr_factor, part.weight_decay, 0 if part.is_frozen else since)
        plans.append(TrainingPlan(plan, lora))
    return tuple(plans)


DEFAULT_PLAN = training_plans(TrainableConfig(), [PhaseTrainable()])[0]
"""The papers' training: everything but the vision encoder."""
