"""The other side of a conversion, computed by transformers' own layers from its own tensors under its own names.

What AKI adds to stock models (resampler, added tokens, head bias) is said plainly here, without our model's code. Every
part is made when it is asked for and holds its weights in fp32, so that one layer is in memory at a time.

B rows, T places, N images, P patches, Q latents, W width of the encoder, D width of the decoder, V tokens, H heads.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config, SiglipVisionConfig
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings

from aki_megatron.checkpoint.tensors import NameTable, TensorSource, to_external
from aki_megatron.checkpoint.weight_names import language_names, vision_names
from aki_megatron.config.model import ModelConfig
from aki_megatron.types import Batch, Modality

LAYERS: dict[str, tuple[Any, Any, Any, Any]] = {
    "phi3": (
        Phi3Config,
        modeling_phi3.Phi3DecoderLayer,
        modeling_phi3.Phi3RMSNorm,
        modeling_phi3.Phi3RotaryEmbedding,
    ),
    "llama": (
        LlamaConfig,
        modeling_llama.LlamaDecoderLayer,
        modeling_llama.LlamaRMSNorm,
        modeling_llama.LlamaRotaryEmbedding,
    ),
    "qwen2": (
        Qwen2Config,
        modeling_qwen2.Qwen2DecoderLayer,
        modeling_qwen2.Qwen2RMSNorm,
        modeling_qwen2.Qwen2RotaryEmbedding,
    ),
    "qwen3": (
        Qwen3Config,
        modeling_qwen3.Qwen3DecoderLayer,
        modeling_qwen3.Qwen3RMSNorm,
        modeling_qwen3.Qwen3RotaryEmbedding,
    ),
}
"""Family -> configuration, decoder layer, norm and rotary embedding of transformers."""


@dataclass(frozen=True)
class Reference:
    """The other side of a conversion."""

    source: TensorSource
    names: NameTable
    """Our names -> its names. What it does not hold (a stock language model has no resampler, no added tokens and no
    head bias) is left out, taken from our side, and named in the report."""
    language: Mapping[str, Any]
    """config.json of its language model, as transformers reads it."""
    vision: Mapping[str, Any]
    """config.json of its SigLIP encoder."""


class HFReferenceModel:
    """Its parts, in the order in which a batch goes through them."""

    def __init__(self, ours: TensorSource, config: ModelConfig, reference: Reference) -> None:
        make_config, self._make_layer, self._make_norm, self._make_rotary = LAYERS[config.decoder.family]
        # copies: transformers completes the dictionaries that it is given
        self._language = make_config.from_dict(deepcopy(dict(reference.language)), attn_implementation="eager")
        self._vision = SiglipVisionConfig.from_dict(deepcopy(dict(reference.vision)), attn_implementation="eager")
        self._config = config
        self._ours = ours
        self.not_held = tuple(sorted(ours.facts.keys() - reference.names.keys()))
        """Our tensors that it lacks."""
        self._dtypes: dict[str, torch.dtype] = {}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        stock = {**language_names(config.decoder), **vision_names(config.vision, "")}
        for name, fact in ours.facts.items():
            held = name in reference.names
            names = reference.names[name] if held else stock.get(name, (name,))
            source = reference.source if held else to_external(ours, {name: names}, config.decoder)
            dtype = min(fact.dtype, *(source.facts[n].dtype for n in names), key=lambda dtype: dtype.itemsize)
            self._dtypes[name] = dtype
            for stock_name, its_name in zip(stock.get(name, (name,)), names, strict=True):
                self._readers[stock_name] = partial(_read, source, its_name, dtype)

    def ours(self, name: str) -> Tensor:
        """One of our tensors in fp32, rounded to the precision of the other side's where that is lower."""
        return _read(self._ours, name, self._dtypes[name])

    def start(self, batch: Batch) -> Tensor:
        """Token vectors with the image in its places, [B, T, D]."""
        decoder = self._config.decoder
        added = batch.token_ids >= decoder.vocab_size
        vectors = self._table("model.embed_tokens.weight", "front.embedding.table.weight")[
            batch.token_ids.where(~added, 0)
        ]
        if decoder.num_added_tokens:
            vectors[added] = self._readers["front.embedding.extra"]()[batch.token_ids[added] - decoder.vocab_size]
        vectors[batch.modality_ids == Modality.IMAGE] = self._resampled(self._features(batch.pixels)).flatten(0, 1)
        return vectors

    def turns(self, live: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, d] of rows whose live places [B, T] come first; each row is a sequence by itself."""
        cos = torch.zeros(*live.shape, self._config.decoder.head_dim)
        sin = cos.clone()
        for row, length in enumerate(live.sum(dim=1).tolist()):
            cos[row, :length], sin[row, :length] = (
                part[0] for part in self._make_rotary(self._language)(cos, torch.arange(length)[None])
            )
        return cos, sin

    def layer(self, number: int) -> nn.Module:
        """A decoder layer of transformers."""
        return self._module(lambda: self._make_layer(self._language, number), f"model.layers.{number}.")

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D] after the last layer."""
        decoder = self._config.decoder
        norm = self._module(
            lambda: self._make_norm(decoder.hidden_size, eps=self._language.rms_norm_eps), "model.norm."
        )
        hidden = norm(hidden)
        if decoder.tie_word_embeddings:
            head = self._table("model.embed_tokens.weight", "front.embedding.table.weight")
        else:
            head = self._table("lm_head.weight", "head.output.weight")
        logits = [F.linear(hidden, head[: decoder.vocab_size])]
        if decoder.lm_head_bias:
            logits[0] = logits[0] + self._readers["head.output.bias"]()[: decoder.vocab_size]
        if decoder.num_added_tokens:
            rows = self._readers["front.embedding.extra" if decoder.tie_word_embeddings else "head.extra.weight"]()
            logits.append(F.linear(hidden, rows, self._readers["head.extra.bias"]() if decoder.lm_head_bias else None))
        return torch.cat(logits, dim=-1)

    def _table(self, name: str, ours: str) -> Tensor:
        """A table by its stock name, with our rows after its own where it was grown for added tokens."""
        table = self._readers[name]()
        rows = len(table)
        return table if rows == self._config.decoder.padded_vocab_size else torch.cat([table, self.ours(ours)[rows:]])

    def _features(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] -> patch features [N, P, W], by transformers' SigLIP."""
        embeddings = SiglipVisionEmbeddings(self._vision)  # not on the meta device: it has a table of positions
        embeddings.load_state_dict(self._state("embeddings."))
        hidden = embeddings(pixels)
        for number in range(self._vision.num_hidden_layers):
            layer = self._module(lambda: SiglipEncoderLayer(self._vision), f"encoder.layers.{number}.")
            hidden = layer(hidden, attention_mask=None)
        width, eps = self._vision.hidden_size, self._vision.layer_norm_eps
        return self._module(lambda: nn.LayerNorm(width, eps=eps), "post_layernorm.")(hidden)

    def _resampled(self, media: Tensor) -> Tensor:
        """Patch features [N, P, W] -> vectors [N, Q, D], by the Perceiver resampler's definition."""
        config, weights = self._config.resampler, self._state("front.resampler.")
        heads = (config.num_heads, config.head_dim)

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.norm_eps)

        latents = weights["latents"].expand(len(media), -1, -1)
        for number in range(config.num_layers):
            at, ff = f"blocks.{number}.attention", f"blocks.{number}.feed_forward"
            asking = norm(latents, f"{at}.norm_latents")
            asked = torch.cat([norm(media, f"{at}.norm_media"), asking], dim=1)
            q = (asking @ weights[f"{at}.query.weight"].T).unflatten(-1, heads)
            k, v = ((asked @ rows.T).unflatten(-1, heads) for rows in weights[f"{at}.key_value.weight"].chunk(2))
            scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / config.head_dim**0.5
            seen = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(dim=-1), v).flatten(2)
            latents = latents + seen @ weights[f"{at}.out.weight"].T
            inner = norm(latents, f"{ff}.norm") @ weights[f"{ff}.up.weight"].T
            latents = latents + F.gelu(inner) @ weights[f"{ff}.down.weight"].T
        return norm(latents, "norm") @ weights["projection.weight"].T + weights["projection.bias"]

    def _state(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): read() for name, read in self._readers.items() if name.startswith(prefix)}

    def _module(self, make: Callable[[], nn.Module], prefix: str) -> nn.Module:
        """A module whose tensors are those under ``prefix``, all of them."""
        with torch.device("meta"):
            module = make()
        module.load_state_dict(self._state(prefix), assign=True)
        return module.eval()


def _read(source: TensorSource, name: str, dtype: torch.dtype) -> Tensor:
    return source.get(name).to(dtype).float()
