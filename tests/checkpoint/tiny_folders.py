"""Tiny random Hugging Face folders of the published backbones and of SigLIP, each with its backbone's traits."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from aki_megatron.families.registry import FAMILIES

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.1,
}
WORDS = 54
"""Words of the tokenizers; special tokens come after them."""

FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.1, 3.0, 12.0, 33.0]}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PHI3_END, CHAT_END = "<|endoftext|>", "<|im_end|>"

BACKBONES: dict[str, tuple[Any, Any, dict[str, Any], tuple[str, ...]]] = {
    "Phi-3.5-mini": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "num_key_value_heads": 4,
            "vocab_size": 64,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "rope_scaling": {"type": "longrope", **FACTORS},
        },
        (PHI3_END,),
    ),
    "LLaMA-3.2-3B": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "num_key_value_heads": 2,
            "vocab_size": WORDS + 1,  # every row is a token's
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32},
            "max_position_embeddings": 256,
        },
        ("<|eot_id|>",),
    ),
    "Qwen2.5-3B": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"num_key_value_heads": 2, "vocab_size": 72, "tie_word_embeddings": True},
        (CHAT_END, PHI3_END),
    ),
    "Qwen3-0.6B": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"num_key_value_heads": 2, "vocab_size": 72, "tie_word_embeddings": True, "head_dim": 16},
        (CHAT_END, PHI3_END),
    ),
    "Qwen3-1.7B": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"num_key_value_heads": 2, "vocab_size": 72, "tie_word_embeddings": True, "head_dim": 8},
        (CHAT_END, PHI3_END),
    ),
    "Qwen3-8B": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"num_key_value_heads": 1, "vocab_size": 72, "tie_word_embeddings": False, "head_dim": 8},
        (CHAT_END, PHI3_END),
    ),
}
"""Published model -> transformers' configuration and model, values, special tokens: end of text, and padding if any."""


def language_folder(folder: Path, backbone: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A random model with its tokenizer, as transformers writes them."""
    make_config, make_model, values, special = BACKBONES[backbone]
    torch.manual_seed(0)
    model = roughened(make_model(make_config(**SIZES | values, pad_token_id=None, bos_token_id=0, eos_token_id=WORDS)))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    markers = chat_markers(model.config.model_type, special)
    names = [f"w{number}" for number in range(WORDS - len(markers))] + markers
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken(name, special=True) for name in (*special, *markers)])
    named = dict(zip(("eos_token", "pad_token"), special, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", **named).save_pretrained(folder)
    return folder


def chat_markers(family: str, others: tuple[str, ...]) -> list[str]:
    """Special tokens of the family's chat format but for ``others``; they are the last words of a tokenizer."""
    return [name for name in FAMILIES[family].chat.special_tokens if name not in others]


def vision_folder(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A random SigLIP encoder."""
    values = SIZES | {"image_size": 30, "patch_size": 7}
    values.pop("initializer_range")
    torch.manual_seed(1)
    roughened(SiglipVisionModel(SiglipVisionConfig(**values))).to(dtype).save_pretrained(folder)
    return folder


def roughened(model: PreTrainedModel) -> Any:
    """Norms moved off one and biases off zero, so that a forgotten one is noticed."""
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model
