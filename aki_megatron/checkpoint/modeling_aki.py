"""AKI for plain transformers (5.x): this file is copied into an exported folder and needs only it and torch.

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=[...], images=[...], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=64)

SigLIP's patch features go through a Perceiver resampler and take the places of ``<image>`` in the text. Under the
attention rule ``mma`` (modality-mutual attention) an image also sees the prompt after it: the model needs
``modality_ids``, which the processor makes, and hands the language model a mask of numbers that ``sdpa`` and ``eager``
add to the scores. A backend that takes no such mask is refused. Generated tokens see all that is before them.

B rows, T tokens, N images, P patches, Q latents per image, W width of the vision encoder, D width of the decoder.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, SiglipVisionConfig, SiglipVisionModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

PAD, TEXT, RESPONSE, IMAGE = 0, 1, 2, 3
"""Values of ``modality_ids``: padding, prompt, what was answered, places of an image."""

BACKENDS = ("sdpa", "eager")
"""Implementations of attention that take a mask of any form."""

DISAGREE = "attention_mask and modality_ids disagree about padding; pass both as the processor made them."

RULES = ("causal", "mma")
"""Attention rules a model may have been trained under."""


def mutual_mask(modality_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, T, T] of rule ``mma``: 0 where a row sees a column, else the lowest number of ``dtype``.

    Every row sees its past, an image also the prompt after it in its own turn, and none sees padding. A row of padding
    sees itself, so that no row is empty.
    """
    query, key = modality_ids[:, :, None], modality_ids[:, None, :]
    place = torch.arange(modality_ids.shape[1], device=modality_ids.device)
    # two places of prompts are in one turn where nothing was answered between them
    answered = (modality_ids == RESPONSE).cumsum(-1)
    ahead = (query == IMAGE) & (key == TEXT) & (answered[:, :, None] == answered[:, None, :])
    seen = ((place[None, :] <= place[:, None]) | ahead) & (key != PAD) | (place[None, :] == place[:, None])
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)


class AkiConfig(PreTrainedConfig):
    """Sizes of SigLIP, of the resampler and of a Phi-3, LLaMA, Qwen2 or Qwen3 model; the vocabulary; the rule.

    num_image_tokens latents of the resampler: places of one image in the text
    base_tokens      tokens that read the tables of the language model
    extra_tokens     tokens after them, with rows of their own; the first of them is <image>
    head_bias        whether the head has a bias
    attention_rule   one of RULES
    """

    model_type = "aki"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        num_image_tokens: int = 144,
        resampler_layers: int = 6,
        resampler_heads: int = 8,
        resampler_head_dim: int = 64,
        resampler_mlp_ratio: int = 4,
        resampler_norm_eps: float = 1e-5,
        image_token_id: int = 32012,
        base_tokens: int = 32012,
        extra_tokens: int = 2,
        head_bias: bool = True,
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
        self.resampler_layers, self.resampler_heads = resampler_layers, resampler_heads
        self.resampler_head_dim = resampler_head_dim
        self.resampler_mlp_ratio, self.resampler_norm_eps = resampler_mlp_ratio, resampler_norm_eps
        self.image_token_id = image_token_id
        self.base_tokens, self.extra_tokens = base_tokens, extra_tokens
        self.head_bias, self.attention_rule = head_bias, attention_rule
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The language model as generation sees it: with a token for every column of the logits."""
        text = copy.copy(self.text_config)
        text.vocab_size = self.base_tokens + self.extra_tokens
        return text


class AkiResamplerAttention(nn.Module):
    """Latents attend to the image and to themselves."""

    def __init__(self, config: AkiConfig) -> None:
        super().__init__()
        width, inner = config.vision_config.hidden_size, config.resampler_heads * config.resampler_head_dim
        self.heads = config.resampler_heads
        self.norm_media = nn.LayerNorm(width, eps=config.resampler_norm_eps)
        self.norm_latents = nn.LayerNorm(width, eps=config.resampler_norm_eps)
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Media [N, P, W], latents [N, Q, W] -> [N, Q, W]"""
        latents = self.norm_latents(latents)
        keys, values = self.key_value(torch.cat([self.norm_media(media), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(latents), keys, values))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AkiResamplerBlock(nn.Module):
    """Cross-attention and feed-forward (exact GELU), both added to the latents."""

    def __init__(self, config: AkiConfig) -> None:
        super().__init__()
        width, inner = config.vision_config.hidden_size, config.resampler_mlp_ratio * config.vision_config.hidden_size
        self.attention = AkiResamplerAttention(config)
        self.feed_forward = nn.ModuleDict(
            {
                "norm": nn.LayerNorm(width, eps=config.resampler_norm_eps),
                "up": nn.Linear(width, inner, bias=False),
                "down": nn.Linear(inner, width, bias=False),
            }
        )

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Media [N, P, W], latents [N, Q, W] -> [N, Q, W]"""
        latents = latents + self.attention(media, latents)
        norm, up, down = self.feed_forward.values()
        return latents + down(F.gelu(up(norm(latents))))


class AkiResampler(nn.Module):
    """Perceiver resampler: patch features [N, P, W] to Q vectors of the decoder's width, [N, Q, D]."""

    def __init__(self, config: AkiConfig) -> None:
        super().__init__()
        width = config.vision_config.hidden_size
        self.latents = nn.Parameter(torch.randn(config.num_image_tokens, width))
        self.blocks = nn.ModuleList(AkiResamplerBlock(config) for _ in range(config.resampler_layers))
        self.norm = nn.LayerNorm(width, eps=config.resampler_norm_eps)
        self.projection = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, media: Tensor) -> Tensor:
        """[N, P, W] -> [N, Q, D]"""
        latents = self.latents.expand(media.shape[0], -1, -1)
        for block in self.blocks:
            latents = block(media, latents)
        return self.projection(self.norm(latents))


class AkiPreTrainedModel(PreTrainedModel):
    """What the two models share."""

    config: AkiConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["AkiResampler"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    def __init__(self, config: AkiConfig) -> None:
        _check_backend(config)
        super().__init__(config)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # the parts follow it; the forward pass checks what they were set to


class AkiModel(AkiPreTrainedModel):
    """Encoder, resampler, embeddings and language model without its head."""

    def __init__(self, config: AkiConfig) -> None:
        super().__init__(config)
        tower = SiglipVisionModel(config.vision_config)
        # older releases wrap the transformer once more; the folder's names are those without the wrapper
        self.vision_tower = getattr(tower, "vision_model", tower)
        self.resampler = AkiResampler(config)
        self.language_model = AutoModel.from_config(config.text_config)
        extra, width = config.extra_tokens, config.text_config.hidden_size
        self.extra_embedding = nn.Embedding(extra, width) if extra else None
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], as the processor normalizes them -> vectors [N, Q, D]"""
        return self.resampler(self.vision_tower(pixel_values).last_hidden_state)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> vectors [B, T, D]; ids from ``base_tokens`` on have rows of their own."""
        table, places = self.language_model.get_input_embeddings(), input_ids - self.config.base_tokens
        if self.extra_embedding is None:
            return table(input_ids)
        added, extra = places >= 0, self.extra_embedding(places.clamp(min=0))
        return torch.where(added.unsqueeze(-1), extra, table(input_ids.masked_fill(added, 0)))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D] of a whole text, or of tokens that follow what ``past_key_values`` holds.

        input_ids       [B, T]; places of images hold the image token
        attention_mask  [B, tokens in the cache + T], 0 on padding; None: made from modality_ids, or no padding
        modality_ids    [B, T]; must be given with images, and only with a whole text
        pixel_values    [N, 3, H, W], images in the row-major order of their places
        position_ids    [B, T]; None: every row counts its own tokens from 0
        """
        _check_backend(self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past_key_values is not None and past_key_values.is_compileable:
            raise ValueError("A static cache brings a mask of its own; use the default, dynamic cache.")
        attention_mask = self._padding(input_ids, attention_mask, modality_ids, past)
        hidden = self._with_images(input_ids, modality_ids, pixel_values)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        if modality_ids is not None and self.config.attention_rule == "mma":
            attention_mask = mutual_mask(modality_ids, hidden.dtype)
        return self.language_model(
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _padding(
        self, input_ids: Tensor, attention_mask: Tensor | None, modality_ids: Tensor | None, past: int
    ) -> Tensor:
        """The mask of padding [B, past + T], checked."""
        rows, tokens = input_ids.shape
        if modality_ids is not None and (modality_ids.shape != input_ids.shape or past):
            raise ValueError(
                f"modality_ids {tuple(modality_ids.shape)} must be those of a whole text and have the shape of "
                f"input_ids {(rows, tokens)}; the cache holds {past} tokens already."
            )
        if attention_mask is None:
            alone = torch.ones(rows, past + tokens, dtype=torch.long, device=input_ids.device)
            return alone if modality_ids is None else (modality_ids != PAD).long()
        if attention_mask.shape != (rows, past + tokens):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} must be [rows, tokens] = {(rows, past + tokens)}, 0 on "
                "padding: the model makes the mask of its attention rule itself."
            )
        if modality_ids is not None and not torch.equal(attention_mask != 0, modality_ids != PAD):
            raise ValueError(DISAGREE)
        return attention_mask

    def _with_images(self, input_ids: Tensor, modality_ids: Tensor | None, pixel_values: Tensor | None) -> Tensor:
        """Vectors [B, T, D] of the tokens, image vectors at their places. What is missing is never taken as causal."""
        if pixel_values is not None and modality_ids is None:
            raise ValueError(
                "pixel_values came without modality_ids: the attention rule "
                f"{self.config.attention_rule!r} cannot be applied. Pass everything that the processor returns."
            )
        places = input_ids == self.config.image_token_id if modality_ids is None else modality_ids == IMAGE
        images, size = 0 if pixel_values is None else len(pixel_values), self.config.num_image_tokens
        # one token alone is a generated one, which may be any
        if input_ids.shape[1] > 1 and int(places.sum()) != images * size:
            raise ValueError(
                f"The text has {int(places.sum())} places of images, but pixel_values hold {images} images, "
                f"which take {size} places each."
            )
        hidden = self.embed(input_ids)
        if pixel_values is None:
            return hidden
        return hidden.masked_scatter(places.unsqueeze(-1), self.get_image_features(pixel_values).to(hidden.dtype))


class AkiForConditionalGeneration(AkiPreTrainedModel, GenerationMixin):
    """The whole model. Logits have ``base_tokens + extra_tokens`` columns."""

    def __init__(self, config: AkiConfig) -> None:
        super().__init__(config)
        extra, width = config.extra_tokens, config.text_config.hidden_size
        self.model = AkiModel(config)
        self.lm_head = nn.Linear(width, config.text_config.vocab_size, bias=config.head_bias)
        self.lm_head_extra = nn.Linear(width, extra, bias=config.head_bias) if extra else None
        self._tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"} | (
            {"lm_head_extra.weight": "model.extra_embedding.weight"} if extra else {}
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] (of the last ``logits_to_keep`` places), and the mean loss of ``labels`` [B, T] if given.

        Labels stand at their own tokens, as everywhere in transformers; -100 where nothing is learnt. The other
        arguments are those of AkiModel.
        """
        given = (attention_mask, modality_ids, pixel_values, position_ids, past_key_values)
        outputs = self.model(input_ids, *given, use_cache=use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        logits = self.lm_head(hidden)[..., : self.config.base_tokens]
        if self.lm_head_extra is not None:
            logits = torch.cat([logits, self.lm_head_extra(hidden)], dim=-1)
        return CausalLMOutputWithPast(
            loss=None if labels is None else self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What one forward pass gets: images and modalities with a whole text only, and then for all of its tokens."""
        if past_key_values is not None and self._outgrows_short_factors(input_ids, attention_mask, past_key_values):
            past_key_values = None  # all is computed anew, the whole batch, as Phi-3 does it
            whole = {"next_sequence_length": None, "cache_position": torch.ones_like(input_ids[0]).cumsum(0) - 1}
            kwargs |= {key: value for key, value in whole.items() if key in kwargs}
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            if modality_ids is not None:
                if attention_mask is None and bool((modality_ids == PAD).any()):
                    raise ValueError(DISAGREE)  # here None says that there is no padding
                new = input_ids.shape[1] - modality_ids.shape[1]
                modality_ids = F.pad(modality_ids, (0, new), value=RESPONSE)
            inputs |= {"modality_ids": modality_ids, "pixel_values": pixel_values}
        inputs.pop("inputs_embeds", None)  # transformers 5.0 passes it, empty
        return inputs

    def _outgrows_short_factors(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache) -> bool:
        """Whether the longest row just got too long for longrope's short factors, by which the cache was turned."""
        rope, past = self.config.text_config.rope_parameters, cache.get_seq_length()
        if rope["rope_type"] != "longrope" or not past:
            return False
        longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(-1).max())
        return longest - (input_ids.shape[1] - past) <= rope["original_max_position_embeddings"] < longest

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat every row for its beams, and the images of every row as a group: rows may have none or several."""
        pixel_values, modality_ids = kwargs.pop("pixel_values", None), kwargs.get("modality_ids")
        if pixel_values is not None and modality_ids is not None and expand_size > 1:
            counts = ((modality_ids == IMAGE).sum(-1) // self.config.num_image_tokens).tolist()
            if sum(counts) == len(pixel_values):  # else the forward pass says what is wrong
                pixel_values = torch.cat([group for group in pixel_values.split(counts) for _ in range(expand_size)])
        parent: Any = super()
        input_ids, kwargs = parent._expand_inputs_for_generation(expand_size, input_ids=input_ids, **kwargs)
        return input_ids, kwargs | {"pixel_values": pixel_values}


def _check_backend(config: AkiConfig) -> None:
    chosen = config.text_config._attn_implementation
    if chosen not in (None, *BACKENDS):
        raise ValueError(f"attn_implementation={chosen!r} would drop the mask; choose one of {list(BACKENDS)}.")
