"""Which part of the model a parameter belongs to, and which parameters a training plan trains."""

from torch import nn

from aki_megatron.config.trainable import PartPlan, TrainingPlan

PART_PREFIXES = {
    "input_embedder.vision_encoder.": "vision",
    "input_embedder.resampler.": "resampler",
    "input_embedder.audio_encoder.": "audio",
    "input_embedder.audio_resampler.": "resampler",
    "input_embedder.token_embedding.": "embeddings",
    "layers.": "decoder",
    "lm_head.": "head",
}
"""Start of a parameter's name in the whole model -> its part in the configuration's table ``trainable``, which has none
for audio: that encoder is always frozen."""

NEVER_TRAINED = ("input_embedder.vision_encoder.pooling_head.",)
"""Parameters that no forward pass uses: without a gradient, weight decay alone would change them."""

ADAPTER = ".lora_"
"""Inside the name of every parameter of a low-rank adapter, and of no other."""


def part_of(name: str) -> str:
    """Return the part that the parameter of this global name belongs to. A tied LM head has the embedding's names."""
    return next(part for prefix, part in PART_PREFIXES.items() if name.startswith(prefix))


def is_trained(name: str, plan: TrainingPlan) -> bool:
    """Return whether a plan trains the parameter of this global name."""
    mode = part_plan(name, plan).mode
    if name.startswith(NEVER_TRAINED):
        return False
    return mode == "lora" if ADAPTER in name else mode == "full"


def part_plan(name: str, plan: TrainingPlan) -> PartPlan:
    """Return the plan of the part that a parameter belongs to."""
    return plan.part(part_of(name))


def set_trained(module: nn.Module, names: dict[str, str], plan: TrainingPlan) -> None:
    """Let exactly the parameters that ``plan`` trains require a gradient.

    names  of the module's parameters -> their global names
    """
    for own, parameter in module.named_parameters():
        parameter.requires_grad_(is_trained(names[own], plan))
