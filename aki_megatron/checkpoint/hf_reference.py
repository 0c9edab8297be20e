"""The reference that a conversion is checked against: transformers' own layers with the external tensors and names.

What AKI adds to stock models (resampler, added tokens, LM head bias) is computed here from its definition, without our
model's code. Every module is built when it is needed and holds fp32 weights, so one layer is in memory at a time.

B sequences, T positions, N images, P patches, Q latents, W vision hidden size, D decoder hidden size, V vocabulary,
H attention heads, d head dimension.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, WhisperConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from aki_megatron.checkpoint.tensors import NameTable, TensorSource, to_external
from aki_megatron.checkpoint.weight_names import LM_HEAD, TOKEN_EMBEDDING, audio_names, language_names, vision_names
from aki_megatron.config.model import ModelConfig, ResamplerConfig
from aki_megatron.families.registry import FAMILIES
from aki_megatron.types import Batch, Modality

ADDED_EMBEDDING = "input_embedder.token_embedding.added_tokens"
ADDED_LM_HEAD = "lm_head.added_tokens"
RESAMPLER, AUDIO_RESAMPLER = "input_embedder.resampler.", "input_embedder.audio_resampler."
AUDIO = "audio."
"""Put before the names in Whisper's encoder, to tell them from others."""


@dataclass(frozen=True)
class Reference:
    """External tensors, and the configurations of the stock models that they belong to."""

    source: TensorSource
    names: NameTable
    """Native name -> external names. Tensors that ``source`` lacks (a stock language model has no resampler, no added
    tokens and no LM head bias) are not in it: the reference takes the native ones, and the report names them."""
    language: Mapping[str, Any]
    """config.json of the language model, as transformers reads it."""
    vision: Mapping[str, Any]
    """config.json of the SigLIP encoder."""
    audio: Mapping[str, Any] | None = None
    """config.json of the Whisper model; None: a model without audio, or whose encoder no source holds."""


class HFReferenceModel:
    """Its parts, in the order in which a batch passes them."""

    def __init__(self, native: TensorSource, config: ModelConfig, reference: Reference) -> None:
        self._family = FAMILIES[config.decoder.family]
        classes = self._family.reference
        # copies: transformers completes the dictionaries that it is given
        self._language = _load_class(classes.config).from_dict(
            deepcopy(dict(reference.language)), attn_implementation="eager"
        )
        self._vision = SiglipVisionConfig.from_dict(deepcopy(dict(reference.vision)), attn_implementation="eager")
        self._audio = reference.audio
        self._config = config
        self._native = native
        self.missing = tuple(sorted(native.specs.keys() - reference.names.keys()))
        """Native tensors that the reference's source lacks."""
        self._dtypes: dict[str, torch.dtype] = {}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        """Name in the stock model, or native name of a tensor that stock models lack -> how to read it."""
        stock = {**language_names(config.decoder), **vision_names(config.vision, "")}
        stock |= audio_names(config.audio, AUDIO) if config.audio else {}
        for name, spec in native.specs.items():
            found = name in reference.names
            names = reference.names[name] if found else stock.get(name, (name,))
            source = reference.source if found else to_external(native, {name: names}, config.decoder)
            dtype = min(spec.dtype, *(source.specs[n].dtype for n in names), key=lambda dtype: dtype.itemsize)
            self._dtypes[name] = dtype
            for stock_name, external in zip(stock.get(name, (name,)), names, strict=True):
                self._readers[stock_name] = partial(_read, source, external, dtype)

    def native_tensor(self, name: str) -> Tensor:
        """Return a native tensor in fp32, rounded to the precision of the external one where that is lower."""
        return _read(self._native, name, self._dtypes[name])

    def embed(self, batch: Batch) -> Tensor:
        """Return the input embeddings [B, T, D], those of media at their positions."""
        decoder = self._config.decoder
        added = batch.token_ids >= decoder.vocab_size
        embeds = self._padded(TOKEN_EMBEDDING)[batch.token_ids.where(~added, 0)]
        if decoder.num_added_tokens:
            embeds[added] = self._readers[ADDED_EMBEDDING]()[batch.token_ids[added] - decoder.vocab_size]
        features = self._vision_features(batch.media[Modality.IMAGE])
        latents = self._resample(features, self._config.resampler, RESAMPLER)
        embeds[batch.modality_ids == Modality.IMAGE] = latents.flatten(0, 1)
        if self._config.audio is not None:
            features = self._audio_features(batch.media[Modality.AUDIO])
            latents = self._resample(features, self._config.audio.resampler, AUDIO_RESAMPLER)
            embeds[batch.modality_ids == Modality.AUDIO] = latents.flatten(0, 1)
        return embeds

    def rotary(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [B, T, d] for right-padded sequences.

        valid  bool [B, T], False on padding
        """
        make = _load_class(self._family.reference.rotary)
        cos = torch.zeros(*valid.shape, self._config.decoder.head_dim)
        sin = cos.clone()
        # one sequence at a time: longrope chooses its factors by the longest sequence of a call
        for number, length in enumerate(valid.sum(dim=1).tolist()):
            cos[number, :length], sin[number, :length] = (
                part[0] for part in make(self._language)(cos, torch.arange(length)[None])
            )
        return cos, sin

    def layer(self, number: int) -> nn.Module:
        """Return decoder layer ``number``, of transformers' class."""
        weights, make = self._family.weights, _load_class(self._family.reference.layer)
        prefix = weights.base_model_prefix + weights.layer_prefix.replace("{i}", str(number))
        return self._module(lambda: make(self._language, number), prefix)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] from hidden states [..., D] after the last layer."""
        decoder, weights = self._config.decoder, self._family.weights
        eps = getattr(self._language, self._family.config.field_keys["norm_eps"])
        make = _load_class(self._family.reference.norm)
        prefix = weights.base_model_prefix + weights.final_norm.removesuffix("weight")
        hidden = self._module(lambda: make(decoder.hidden_size, eps=eps), prefix)(hidden)
        lm_head = self._padded(TOKEN_EMBEDDING if decoder.tie_word_embeddings else LM_HEAD)
        logits = [F.linear(hidden, lm_head[: decoder.vocab_size])]
        if decoder.lm_head_bias:
            logits[0] = logits[0] + self._readers["lm_head.base.bias"]()[: decoder.vocab_size]
        if decoder.num_added_tokens:
            added = self._readers[ADDED_EMBEDDING if decoder.tie_word_embeddings else f"{ADDED_LM_HEAD}.weight"]()
            bias = self._readers[f"{ADDED_LM_HEAD}.bias"]() if decoder.lm_head_bias else None
            logits.append(F.linear(hidden, added, bias))
        return torch.cat(logits, dim=-1)

    def _padded(self, name: str) -> Tensor:
        """The external embedding or LM head [padded_vocab_size, D], with our rows after those that it has."""
        (stock_name,) = language_names(self._config.decoder)[name]
        tensor = self._readers[stock_name]()
        rows = len(tensor)
        if rows == self._config.decoder.padded_vocab_size:
            return tensor
        return torch.cat([tensor, self.native_tensor(name)[rows:]])

    def _vision_features(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] -> patch features [N, P, W], by transformers' SigLIP."""
        embeddings = SiglipVisionEmbeddings(self._vision)  # not on the meta device: it has a buffer of positions
        embeddings.load_state_dict(self._state("embeddings."))
        hidden = embeddings(pixels)
        for number in range(self._vision.num_hidden_layers):
            layer = self._module(lambda: SiglipEncoderLayer(self._vision), f"encoder.layers.{number}.")
            hidden = layer(hidden, attention_mask=None)
        dim, eps = self._vision.hidden_size, self._vision.layer_norm_eps
        return self._module(lambda: nn.LayerNorm(dim, eps=eps), "post_layernorm.")(hidden)

    def _audio_features(self, log_mel: Tensor) -> Tensor:
        """Spectrograms [N, M, F] -> features [N, P, W], by transformers' Whisper."""
        audio = self._config.audio
        assert audio is not None
        values = {"d_model": audio.hidden_size, "encoder_layers": audio.num_layers}
        values |= {"encoder_attention_heads": audio.num_heads, "encoder_ffn_dim": audio.intermediate_size}
        values |= {"num_mel_bins": audio.num_mel_bins, "max_source_positions": audio.num_positions}
        config = WhisperConfig.from_dict(values | deepcopy(dict(self._audio or {})), attn_implementation="eager")
        encoder = WhisperEncoder(config)
        encoder.load_state_dict(self._state(AUDIO))
        features: Tensor = encoder.eval()(log_mel).last_hidden_state
        return features

    def _resample(self, media: Tensor, config: ResamplerConfig, prefix: str) -> Tensor:
        """Features [N, P, W] of items -> their embeddings [N, Q, D], by the Perceiver resampler's definition."""
        weights = self._state(prefix)
        heads = (config.num_heads, config.head_dim)

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.norm_eps)

        latents = weights["latents"].expand(len(media), -1, -1)
        for number in range(config.num_layers):
            attention, mlp = f"layers.{number}.attention", f"layers.{number}.mlp"
            queries = norm(latents, f"{attention}.norm_latents")
            keys = torch.cat([norm(media, f"{attention}.norm_media"), queries], dim=1)
            q = (queries @ weights[f"{attention}.q_proj.weight"].T).unflatten(-1, heads)
            k, v = (
                (keys @ weight.T).unflatten(-1, heads) for weight in weights[f"{attention}.kv_proj.weight"].chunk(2)
            )
            scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / config.head_dim**0.5
            attended = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(dim=-1), v).flatten(2)
            latents = latents + attended @ weights[f"{attention}.out_proj.weight"].T
            inner = norm(latents, f"{mlp}.norm") @ weights[f"{mlp}.up_proj.weight"].T
            latents = latents + F.gelu(inner) @ weights[f"{mlp}.down_proj.weight"].T
        return norm(latents, "norm") @ weights["projection.weight"].T + weights["projection.bias"]

    def _state(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): read() for name, read in self._readers.items() if name.startswith(prefix)}

    def _module(self, make: Callable[[], nn.Module], prefix: str) -> nn.Module:
        """A module with the tensors under ``prefix``; it must take all of them and need no others."""
        with torch.device("meta"):
            module = make()
        module.load_state_dict(self._state(prefix), assign=True)
        return module.eval()


def _load_class(path: str) -> Any:
    """The class of a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _read(source: TensorSource, name: str, dtype: torch.dtype) -> Tensor:
    return source.get(name).to(dtype).float()
