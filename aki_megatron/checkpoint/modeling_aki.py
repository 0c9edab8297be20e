"""AKI for plain transformers (>= 5.0, < 6): copied into an exported folder with configuration_aki.py.

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=[...], images=[...], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=64)

SigLIP's patch features pass a Perceiver resampler and become the embeddings of ``<image>`` in the text. Under the
attention rule ``mma`` (modality-mutual attention) image positions also attend to the prompt after them: the model needs
``modality_ids``, which the processor returns, and gives the language model an additive 4-D attention mask, which
``sdpa`` and ``eager`` take. Other attention implementations are refused. Generated tokens attend to everything before.

B sequences, T positions, N images, P patches, Q latents per image, W vision and D decoder hidden size, V vocabulary.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, SiglipVisionModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_aki import AkiConfig

PAD, TEXT, RESPONSE, IMAGE = 0, 1, 2, 3
"""Values of ``modality_ids``: padding, prompt text, response, image."""

BACKENDS = ("sdpa", "eager")
"""Attention implementations that take a 4-D additive mask."""

OLD_CACHE = "past_key_values"

PADDING_MISMATCH = "attention_mask and modality_ids disagree about padding; pass both as the processor returned them."

CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else OLD_CACHE
"""What this release of transformers calls the key-value cache; ``cache`` since 5.24."""


def mutual_mask(modality_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [B, 1, T, T] of rule ``mma``: 0 where a query attends to a key, else the lowest number.

    Every position attends to those before it, an image position also to the prompt after it in its own turn, and none
    to padding. A padding position attends to itself, so that softmax has no empty row.
    """
    query, key = modality_ids[:, :, None], modality_ids[:, None, :]
    position = torch.arange(modality_ids.shape[1], device=modality_ids.device)
    # two prompt positions are in the same turn where no response position lies between them
    turn = (modality_ids == RESPONSE).cumsum(-1)
    look_ahead = (query == IMAGE) & (key == TEXT) & (turn[:, :, None] == turn[:, None, :])
    causal, itself = position[None, :] <= position[:, None], position[None, :] == position[:, None]
    allowed = (causal | look_ahead) & (key != PAD) | itself
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)


class AkiResamplerAttention(nn.Module):
    """Cross-attention of the latents to the image and to themselves."""

    def __init__(self, config: AkiConfig) -> None:
        super().__init__()
        dim, inner = config.vision_config.hidden_size, config.resampler_num_heads * config.resampler_head_dim
        self.num_heads = config.resampler_num_heads
        self.norm_media = nn.LayerNorm(dim, eps=config.resampler_norm_eps)
        self.norm_latents = nn.LayerNorm(dim, eps=config.resampler_norm_eps)
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Media [N, P, W], latents [N, Q, W] -> [N, Q, W]"""
        latents = self.norm_latents(latents)
        keys, values = self.kv_proj(torch.cat([self.norm_media(media), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.q_proj(latents), keys, values))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AkiResamplerLayer(nn.Module):
    """Cross-attention and MLP (exact GELU), both with a residual connection."""

    def __init__(self, config: AkiConfig) -> None:
        super().__init__()
        dim, inner = config.vision_config.hidden_size, config.resampler_mlp_ratio * config.vision_config.hidden_size
        self.attention = AkiResamplerAttention(config)
        norm = nn.LayerNorm(dim, eps=config.resampler_norm_eps)
        up, down = nn.Linear(dim, inner, bias=False), nn.Linear(inner, dim, bias=False)
        self.mlp = nn.ModuleDict({"norm": norm, "up_proj": up, "down_proj": down})

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Media [N, P, W], latents [N, Q, W] -> [N, Q, W]"""
        latents = latents + self.attention(media, latents)
        norm, up, down = self.mlp.values()
        return latents + down(F.gelu(up(norm(latents))))


class AkiResampler(nn.Module):
    """Perceiver resampler."""

    def __init__(self, config: AkiConfig) -> None:
        super().__init__()
        dim = config.vision_config.hidden_size
        self.latents = nn.Parameter(torch.randn(config.num_image_tokens, dim))
        self.layers = nn.ModuleList(AkiResamplerLayer(config) for _ in range(config.resampler_num_layers))
        self.norm = nn.LayerNorm(dim, eps=config.resampler_norm_eps)
        self.projection = nn.Linear(dim, config.text_config.hidden_size)

    def forward(self, media: Tensor) -> Tensor:
        """Patch features [N, P, W] -> image embeddings [N, Q, D]"""
        latents = self.latents.expand(media.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(media, latents)
        return self.projection(self.norm(latents))


class AkiRotaryPerRow(nn.Module):
    """longrope with the factors of each sequence's length, as in training; transformers takes those of the longest."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Position ids [B, T] -> cos and sin [B, T, d]"""
        rows = [self.rotary(x, row) for row in position_ids.split(1)]
        return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


class AkiPreTrainedModel(PreTrainedModel):
    """Base class of both models."""

    config: AkiConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["AkiResampler"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True

    def __init__(self, config: AkiConfig) -> None:
        _check_backend(config)
        super().__init__(config)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # submodules follow it; the forward pass checks their setting


class AkiModel(AkiPreTrainedModel):
    """Vision encoder, resampler, token embeddings and language model, without the LM head."""

    def __init__(self, config: AkiConfig) -> None:
        super().__init__(config)
        tower = SiglipVisionModel(config.vision_config)
        # older transformers wrap the encoder once more; the folder's tensor names have no wrapper
        self.vision_tower = getattr(tower, "vision_model", tower)
        self.resampler = AkiResampler(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.text_config.rope_parameters["rope_type"] == "longrope":
            self.language_model.rotary_emb = AkiRotaryPerRow(self.language_model.rotary_emb)
        added, dim = config.num_added_tokens, config.text_config.hidden_size
        self.added_embedding = nn.Embedding(added, dim) if added else None
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], as the processor returns them -> image embeddings [N, Q, D]"""
        return self.resampler(self.vision_tower(pixel_values).last_hidden_state)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, D]; ids from ``base_vocab_size`` on are added tokens."""
        embedding = self.language_model.get_input_embeddings()
        if self.added_embedding is None:
            return embedding(input_ids)
        added_ids = input_ids - self.config.base_vocab_size
        is_added, added = added_ids >= 0, self.added_embedding(added_ids.clamp(min=0))
        return torch.where(is_added.unsqueeze(-1), added, embedding(input_ids.masked_fill(is_added, 0)))

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding, without the added tokens."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states [B, T, D] of whole sequences, or of tokens that continue a cache.

        input_ids       [B, T]; image positions hold the image token
        attention_mask  [B, tokens in the cache + T], 0 on padding; None: from modality_ids, or no padding
        modality_ids    [B, T]; required with images, and allowed for whole sequences only
        pixel_values    [N, 3, H, W], images in the row-major order of their positions
        position_ids    [B, T]; None: every sequence counts its own tokens from 0
        cache           key-value cache; ``past_key_values`` is its name before transformers 5.24
        """
        _check_backend(self.config)
        cache = _only_cache(past_key_values, cache, kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        if cache is not None and cache.is_compileable:
            raise ValueError("A static cache has its own attention mask; use the default, dynamic cache.")
        attention_mask = self._padding_mask(input_ids, attention_mask, modality_ids, past)
        hidden = self._embed_with_images(input_ids, modality_ids, pixel_values)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        if modality_ids is not None and self.config.attention_rule == "mma":
            attention_mask = mutual_mask(modality_ids, hidden.dtype)
        return self.language_model(
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs | {CACHE: cache},
        )

    def _padding_mask(
        self, input_ids: Tensor, attention_mask: Tensor | None, modality_ids: Tensor | None, past: int
    ) -> Tensor:
        """The padding mask [B, past + T], checked."""
        batch_size, length = input_ids.shape
        if modality_ids is not None and (modality_ids.shape != input_ids.shape or past):
            raise ValueError(
                f"modality_ids {tuple(modality_ids.shape)} must be those of whole sequences and have the shape of "
                f"input_ids {(batch_size, length)}; the cache holds {past} tokens already."
            )
        if attention_mask is None:
            no_padding = torch.ones(batch_size, past + length, dtype=torch.long, device=input_ids.device)
            return no_padding if modality_ids is None else (modality_ids != PAD).long()
        if attention_mask.shape != (batch_size, past + length):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} must be [B, T] = {(batch_size, past + length)}, 0 on "
                "padding: the model builds the mask of its attention rule itself."
            )
        if modality_ids is not None and not torch.equal(attention_mask != 0, modality_ids != PAD):
            raise ValueError(PADDING_MISMATCH)
        return attention_mask

    def _embed_with_images(self, input_ids: Tensor, modality_ids: Tensor | None, pixel_values: Tensor | None) -> Tensor:
        """Embeddings [B, T, D], image embeddings at image positions. A missing input is an error, never causal."""
        if pixel_values is not None and modality_ids is None:
            raise ValueError(
                "pixel_values came without modality_ids: the attention rule "
                f"{self.config.attention_rule!r} cannot be applied. Pass everything that the processor returns."
            )
        is_image = input_ids == self.config.image_token_id if modality_ids is None else modality_ids == IMAGE
        images, size = 0 if pixel_values is None else len(pixel_values), self.config.num_image_tokens
        # a single token may be a generated one, which may be any
        if input_ids.shape[1] > 1 and int(is_image.sum()) != images * size:
            raise ValueError(
                f"The text has {int(is_image.sum())} image positions, but pixel_values hold {images} images of {size}."
            )
        embeds = self.embed(input_ids)
        if pixel_values is None:
            return embeds
        return embeds.masked_scatter(is_image.unsqueeze(-1), self.get_image_features(pixel_values).to(embeds.dtype))


class AkiForConditionalGeneration(AkiPreTrainedModel, GenerationMixin):
    """The whole model; V is ``base_vocab_size + num_added_tokens``."""

    def __init__(self, config: AkiConfig) -> None:
        super().__init__(config)
        added, dim = config.num_added_tokens, config.text_config.hidden_size
        self.model = AkiModel(config)
        self.lm_head = nn.Linear(dim, config.text_config.vocab_size, bias=config.lm_head_bias)
        self.lm_head_added = nn.Linear(dim, added, bias=config.lm_head_bias) if added else None
        embedding = self.model.language_model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        if added:
            self._tied_weights_keys["lm_head_added.weight"] = "model.added_embedding.weight"
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding, without the added tokens."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V], of the last ``logits_to_keep`` positions if set, and the mean loss of ``labels``.

        Labels [B, T] are not shifted, as everywhere in transformers; -100 where a token is not supervised. The other
        arguments are those of AkiModel.
        """
        inputs = (attention_mask, modality_ids, pixel_values, position_ids, past_key_values, cache)
        outputs = self.model(input_ids, *inputs, use_cache=use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        logits = self.lm_head(hidden)[..., : self.config.base_vocab_size]
        if self.lm_head_added is not None:
            logits = torch.cat([logits, self.lm_head_added(hidden)], dim=-1)
        return CausalLMOutputWithPast(
            loss=None if labels is None else self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs of one forward pass: images and modality ids with whole sequences only."""
        cache = _only_cache(past_key_values, cache, kwargs)
        if cache is not None and self._outgrows_short_factors(input_ids, attention_mask, cache):
            cache = None  # recompute the whole batch, as transformers does for longrope
            whole = {"next_sequence_length": None, "cache_position": torch.ones_like(input_ids[0]).cumsum(0) - 1}
            kwargs |= {key: value for key, value in whole.items() if key in kwargs}
        parent: Any = super()
        kwargs |= {CACHE: cache}
        inputs = parent.prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        if cache is None or cache.get_seq_length() == 0:
            if modality_ids is not None:
                if attention_mask is None and bool((modality_ids == PAD).any()):
                    raise ValueError(PADDING_MISMATCH)  # None means that there is no padding
                new = input_ids.shape[1] - modality_ids.shape[1]
                modality_ids = F.pad(modality_ids, (0, new), value=RESPONSE)
            inputs |= {"modality_ids": modality_ids, "pixel_values": pixel_values}
        inputs.pop("inputs_embeds", None)  # transformers 5.0 passes None
        return inputs

    def _outgrows_short_factors(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache) -> bool:
        """Whether a sequence just outgrew longrope's short factors, which rotated the cached keys."""
        rope, past = self.config.text_config.rope_parameters, cache.get_seq_length()
        if rope["rope_type"] != "longrope" or not past:
            return False
        rows = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths, limit = rows.sum(-1), rope["original_max_position_embeddings"]
        return bool(((lengths > limit) & (lengths - (input_ids.shape[1] - past) <= limit)).any())

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each sequence for its beams, and its images as a group: a sequence may have none or several."""
        pixel_values, modality_ids = kwargs.pop("pixel_values", None), kwargs.get("modality_ids")
        if pixel_values is not None and modality_ids is not None and expand_size > 1:
            counts = ((modality_ids == IMAGE).sum(-1) // self.config.num_image_tokens).tolist()
            if sum(counts) == len(pixel_values):  # else the forward pass raises an error
                pixel_values = torch.cat([group for group in pixel_values.split(counts) for _ in range(expand_size)])
        parent: Any = super()
        input_ids, kwargs = parent._expand_inputs_for_generation(expand_size, input_ids=input_ids, **kwargs)
        return input_ids, kwargs | {"pixel_values": pixel_values}


def _check_backend(config: AkiConfig) -> None:
    chosen = config.text_config._attn_implementation
    if chosen not in (None, *BACKENDS):
        raise ValueError(f"attn_implementation={chosen!r} would drop the mask; choose one of {list(BACKENDS)}.")


def _only_cache(past_key_values: Cache | None, cache: Cache | None, others: dict[str, Any]) -> Cache | None:
    """Return the key-value cache under either name; an argument that may be a cache of another name is an error."""
    known = ("use_cache", "cache_position")
    unknown = [
        name
        for name, value in others.items()
        if isinstance(value, Cache) or (value is not None and name not in known and ("cache" in name or "past" in name))
    ]
    if unknown or (past_key_values is not None and cache is not None and past_key_values is not cache):
        raise ValueError(
            f"Got the cache arguments {', '.join(unknown) or 'past_key_values and cache'}; give the key-value cache as "
            "past_key_values or as cache, not as both. Ignored, it would give wrong tokens."
        )
    return past_key_values if cache is None else cache
