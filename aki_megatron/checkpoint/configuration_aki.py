"""AKI's configuration for plain transformers (>= 5.0, < 6): this file is copied into an exported folder."""

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, SiglipVisionConfig

RULES = ("causal", "mma")
"""Attention rules that modeling_aki.py implements."""


class AkiConfig(PreTrainedConfig):
    """Configuration of SigLIP, the resampler and the language model, AKI's added tokens, and the attention rule.

    num_image_tokens  latents of the resampler: positions of one image in the text
    base_vocab_size   tokens of the language model's embedding and LM head; ``text_config.vocab_size`` includes padding
    num_added_tokens  tokens after those, with an embedding and LM head of their own; the first is <image>
    lm_head_bias      whether the LM head has a bias
    attention_rule    one of RULES
    """

    model_type = "aki"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        num_image_tokens: int = 144,
        resampler_num_layers: int = 6,
        resampler_num_heads: int = 8,
        resampler_head_dim: int = 64,
        resampler_mlp_ratio: int = 4,
        resampler_norm_eps: float = 1e-5,
        image_token_id: int = 32012,
        base_vocab_size: int = 32012,
        num_added_tokens: int = 2,
        lm_head_bias: bool = True,
        attention_rule: str = "mma",
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        if attention_rule not in RULES:
            raise ValueError(f"attention_rule={attention_rule!r} is unknown; choose one of {list(RULES)}.")
        if vision_config is None or isinstance(vision_config, dict):
            vision_config = SiglipVisionConfig(**(vision_config or {}))
        if text_config is None or isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**({"model_type": "phi3"} | (text_config or {})))
        self.vision_config, self.text_config = vision_config, text_config
        self.num_image_tokens = num_image_tokens
        self.resampler_num_layers, self.resampler_num_heads = resampler_num_layers, resampler_num_heads
        self.resampler_head_dim = resampler_head_dim
        self.resampler_mlp_ratio, self.resampler_norm_eps = resampler_mlp_ratio, resampler_norm_eps
        self.image_token_id = image_token_id
        self.base_vocab_size, self.num_added_tokens = base_vocab_size, num_added_tokens
        self.lm_head_bias, self.attention_rule = lm_head_bias, attention_rule
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """Return the language model's configuration with the vocab_size of the logits, which generation reads."""
        text = copy.copy(self.text_config)
        text.vocab_size = self.base_vocab_size + self.num_added_tokens
        return text
