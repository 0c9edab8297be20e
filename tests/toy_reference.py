"""transformers classes of the family in toy_family.py: Qwen3 with biases on q, k, v, and with other module names."""

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

ToyRMSNorm, ToyRotaryEmbedding = Qwen3RMSNorm, Qwen3RotaryEmbedding


class Renamed:
    """Registers submodules under other names; the attributes that the forward passes read stay."""

    NAMES: dict[str, str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in cls.NAMES.items():
            setattr(cls, old, property(lambda self, new=new: getattr(self, new)))

    def rename(self: Any) -> None:
        for old, new in self.NAMES.items():
            self.add_module(new, self._modules.pop(old))


class ToyConfig(Qwen3Config):
    model_type = "toy"
    attribute_map = {"intermediate_size": "ffn_dim"}


class ToyAttention(Renamed, Qwen3Attention):
    NAMES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "q_norm": "ln_q", "k_norm": "ln_k"}

    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.rename()
        for name in "qkv":
            linear = getattr(self, name)
            setattr(self, name, nn.Linear(linear.in_features, linear.out_features, bias=True))


class ToyMLP(Renamed, Qwen3MLP):
    NAMES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.rename()


class ToyDecoderLayer(Renamed, Qwen3DecoderLayer):
    NAMES = {"self_attn": "attn", "mlp": "ffn", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}

    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.rename()
        self.attn, self.ffn = ToyAttention(config, layer_idx), ToyMLP(config)


class ToyModel(Renamed, Qwen3Model):
    NAMES = {"embed_tokens": "wte", "layers": "h", "norm": "ln_f"}
    config_class = ToyConfig
    base_model_prefix = "transformer"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.rename()
        self.h = nn.ModuleList(ToyDecoderLayer(config, number) for number in range(config.num_hidden_layers))
        self.post_init()


class ToyForCausalLM(Renamed, Qwen3ForCausalLM):
    NAMES = {"model": "transformer", "lm_head": "output"}
    config_class = ToyConfig
    base_model_prefix = "transformer"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.rename()
        self.transformer = ToyModel(config)
        self._tied_weights_keys = {"output.weight": "transformer.wte.weight"}
        self.post_init()


AutoConfig.register("toy", ToyConfig, exist_ok=True)
AutoModel.register(ToyConfig, ToyModel, exist_ok=True)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)
