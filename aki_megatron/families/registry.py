"""The registry of decoder families, by transformers' model_type."""

from aki_megatron.families import llama3, phi3, qwen2, qwen3
from aki_megatron.families.base import Family

FAMILIES: dict[str, Family] = {
    "phi3": phi3.FAMILY,
    "llama": llama3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
}

DEFAULT_FAMILY = "phi3"
"""Family of AKI-4B, whose sizes are the defaults of the model section."""

DEFAULT_ROPE = phi3.PHI35_MINI_ROPE
"""Its model.decoder.rope."""
