"""A pipeline stage of the model: what one pipeline rank holds. The whole model is a stage with everything.

B sequences, T positions, N images, P patches, Q latents per image, D hidden size, V vocabulary columns of the logits,
S supervised positions.

Every parameter takes part in every forward pass, whatever the batch holds: without images the encoder and the resampler
run on an empty batch, without supervised positions so does the LM head. Ranks that share a parameter therefore always
agree on the collectives they call.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aki_megatron.attention import AttentionMask, LayerCache
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig
from aki_megatron.config.trainable import DEFAULT_PLAN, TrainingPlan
from aki_megatron.model.decoder import DecoderLayer
from aki_megatron.model.init import seeded
from aki_megatron.model.linears import LinearFactory, LocalLinears
from aki_megatron.model.media_encoders import media_encoders
from aki_megatron.model.rotary import Rotary
from aki_megatron.model.trainable import set_trained
from aki_megatron.types import IGNORE, NO_SEGMENT, Modality, StackedIds

NO_MEDIA: Mapping[Modality, Tensor] = MappingProxyType({})

EMBEDDING_STD = 0.02
"""Standard deviation of new embeddings (Phi-3's initializer_range, and AKI's for its added tokens)."""


class TokenEmbedding(nn.Module):
    """Token embedding: the table of the vocabulary, and a second table for the added tokens past ``vocab_size``."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.base = linears.embedding(config.padded_vocab_size, config.hidden_size, std=EMBEDDING_STD)
        self.added_tokens = (
            nn.Parameter(torch.randn(config.num_added_tokens, config.hidden_size) * EMBEDDING_STD)
            if config.num_added_tokens
            else None
        )

    def forward(self, token_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]"""
        if self.added_tokens is None:
            return self.base(token_ids)
        is_added = token_ids >= self.vocab_size
        embeds = self.base(token_ids.masked_fill(is_added, 0))
        positions = is_added.flatten().nonzero().squeeze(-1)
        added = F.embedding(token_ids.flatten()[positions] - self.vocab_size, self.added_tokens)
        return embeds.flatten(0, 1).index_copy(0, positions, added.to(embeds.dtype)).view_as(embeds)


def scatter_media_embeds(text_embeds: Tensor, media_embeds: Tensor, modality_ids: Tensor, modality: Modality) -> Tensor:
    """Put embeddings of media [N, Q, D] into the positions of ``modality`` of text embeddings [B, T, D], row-major.

    Raises ValueError when the number of these positions is not N * Q.
    """
    positions = (modality_ids == modality).flatten().nonzero().squeeze(-1)
    latents = media_embeds.flatten(0, 1)
    if len(positions) != len(latents):
        raise ValueError(
            f"The batch has {len(positions)} {modality.name} positions but {media_embeds.shape[0]} items of "
            f"{media_embeds.shape[1]} latents each; both must come from the same samples."
        )
    return text_embeds.flatten(0, 1).index_copy(0, positions, latents.to(text_embeds.dtype)).view_as(text_embeds)


class InputEmbedder(nn.Module):
    """Batch to hidden states: for every modality an encoder and a resampler, and the token embedding."""

    def __init__(self, config: ModelConfig, linears: LinearFactory, *, seed: int) -> None:
        super().__init__()
        self.config = config
        for media in media_encoders(config).values():
            with seeded(seed, f"input_embedder.{media.encoder_name}"):
                self.add_module(media.encoder_name, media.build_encoder(config))
            with seeded(seed, f"input_embedder.{media.resampler_name}"):
                self.add_module(media.resampler_name, media.build_resampler(config))
        with seeded(seed, "input_embedder.token_embedding"):
            self.token_embedding = TokenEmbedding(config.decoder, linears)

    def forward(self, token_ids: Tensor, modality_ids: Tensor, media: Mapping[Modality, Tensor]) -> Tensor:
        """Token and modality ids [B, T], media by modality, each [N, ...] -> hidden [B, T, D]"""
        hidden: Tensor = self.token_embedding(token_ids)
        for modality, parts in media_encoders(self.config).items():
            items = media.get(modality)
            if items is None:
                items = torch.zeros(0, *parts.item_shape(self.config), device=token_ids.device)
            embeds = self.get_submodule(parts.resampler_name)(self.get_submodule(parts.encoder_name)(items))
            hidden = scatter_media_embeds(hidden, embeds, modality_ids, modality)
        return hidden


class LMHead(nn.Module):
    """Hidden states to logits or loss: final norm, output projection, a second one for the added token ids."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory) -> None:
        super().__init__()
        self.config = config
        self.linears = linears
        self.vocab_range = linears.vocab_range(config.padded_vocab_size)
        std = config.hidden_size**-0.5
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.base = linears.lm_head(config.hidden_size, config.padded_vocab_size, bias=config.lm_head_bias, std=std)
        self.added_tokens = None
        if config.num_added_tokens:
            self.added_tokens = LocalLinears().lm_head(
                config.hidden_size, config.num_added_tokens, bias=config.lm_head_bias, std=std
            )

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy (fp32 scalar) of hidden [B, T, D] where targets [B, T] are not IGNORE.

        Only supervised positions go through the projection: in fine-tuning most are not.
        """
        supervised = (targets != IGNORE).flatten().nonzero().squeeze(-1)
        logits = self.logits(hidden.flatten(0, 1)[supervised])
        return self.linears.loss_sum(logits, targets.flatten()[supervised].long())

    def next_tokens(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Most likely next token [S] int64 at each position of hidden [B, T, D] where targets [B, T] are not IGNORE."""
        supervised = (targets != IGNORE).flatten().nonzero().squeeze(-1)
        return self.linears.argmax(self.logits(hidden.flatten(0, 1)[supervised]))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]; column i is token ``vocab_range[i]``. Columns that no token uses are -inf."""
        hidden = self.linears.copy_to_tensor_parallel_region(self.norm(hidden))
        logits = self.base(hidden)
        vocab_size, total = self.config.vocab_size, self.config.total_vocab_size
        first, last = self.vocab_range.start, self.vocab_range.stop
        parts = [logits[..., : max(0, min(last, vocab_size) - first)]]
        if self.added_tokens is not None:
            # every tensor rank holds all added tokens and uses those inside its range of the vocabulary
            copied = self.linears.copy_to_tensor_parallel_region
            bias = self.added_tokens.bias
            added = F.linear(hidden, copied(self.added_tokens.weight), None if bias is None else copied(bias))
            parts.append(added[..., max(0, first - vocab_size) : max(0, min(last, total) - vocab_size)])
        if unused := max(0, last - max(first, total)):
            parts.append(logits.new_full((*logits.shape[:-1], unused), float("-inf")))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else logits


class Stage(nn.Module):
    """InputEmbedder (first stage only), consecutive decoder layers, LMHead (last stage only).

    ``layers`` is keyed by the layer's index in the whole model, so that parameter names do not depend on the partition.
    With ``recompute``, training keeps only the input of each layer and runs the layer again in the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        attention: AttentionConfig,
        input_embedder: InputEmbedder | None,
        layers: dict[int, DecoderLayer],
        lm_head: LMHead | None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.recompute = recompute
        self.input_embedder = input_embedder
        self.layers = nn.ModuleDict({str(index): layer for index, layer in layers.items()})
        self.lm_head = lm_head
        self.rotary = Rotary(config.decoder.rope, config.decoder.head_dim)
        if config.decoder.tie_word_embeddings and input_embedder is not None and lm_head is not None:
            tie_weights(lm_head, input_embedder.token_embedding)

    def build_mask(self, ids: StackedIds) -> AttentionMask:
        """Build the attention mask of a training micro-batch.

        Raises LeakError when the attention rule would let a position see a token that it, or a position between, has to
        predict.
        """
        return self._build_mask(ids, ids.targets != IGNORE)

    def forward(
        self,
        inputs: Tensor,
        ids: StackedIds,
        media: Mapping[Modality, Tensor] = NO_MEDIA,
        *,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """Run one micro-batch.

        inputs  token ids [B, T] int64 on the first stage, hidden [B, T, D] elsewhere
        ids     of the same positions
        media   inputs of the encoders by modality, on the first stage; images are [N, 3, H, W]
        mask    what ``build_mask(ids)`` returns; None: build it here

        Returns the loss summed over supervised positions (fp32 scalar) on the last stage, hidden [B, T, D] elsewhere.
        Raises LeakError like ``build_mask``.
        """
        hidden = self._hidden(inputs, ids, media, mask=self.build_mask(ids) if mask is None else mask)
        return hidden if self.lm_head is None else self.lm_head(hidden, ids.targets)

    def next_tokens(
        self,
        inputs: Tensor,
        ids: StackedIds,
        media: Mapping[Modality, Tensor] = NO_MEDIA,
        *,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """Return what ``forward`` does, but the last stage the most likely next token [S] at each supervised position.

        The target of a position says no more here than that its next token is wanted.
        """
        hidden = self._hidden(inputs, ids, media, mask=self.build_mask(ids) if mask is None else mask)
        return hidden if self.lm_head is None else self.lm_head.next_tokens(hidden, ids.targets)

    def logits(
        self,
        inputs: Tensor,
        ids: StackedIds,
        media: Mapping[Modality, Tensor] = NO_MEDIA,
        caches: list[LayerCache] | None = None,
        *,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return logits [B, T, V] for inference; with ``positions`` [B] those of one position per sequence, [B, V].

        Without caches: a whole sequence. With empty caches, one per layer of this stage: prefill of prompts, one
        segment per sequence, padded on the right; keys and values are kept. With filled caches: one decode step (T =
        1), in which the new token attends to everything in its cache. The next token is taken to be generated after the
        last position of each segment.
        """
        assert self.lm_head is not None, "logits need the stage that holds the LM head"
        mask = lengths = None
        if caches is None or caches[0].max_length == 0:
            segment_ids = ids.segment_ids
            next_segment = F.pad(segment_ids[:, 1:], (0, 1), value=NO_SEGMENT)
            is_last = (segment_ids != NO_SEGMENT) & (segment_ids != next_segment)
            mask = self._build_mask(ids, is_last | (ids.targets != IGNORE))
            lengths = (segment_ids != NO_SEGMENT).sum(dim=1)
        hidden = self._hidden(inputs, ids, media, mask=mask, caches=caches, lengths=lengths)
        if positions is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), positions]
        return self.lm_head.logits(hidden)

    def media_tokens(self) -> dict[Modality, int]:
        """Positions that one item of each modality takes."""
        return {modality: media.num_latents(self.config) for modality, media in media_encoders(self.config).items()}

    def position_ids(self, ids: StackedIds) -> Tensor:
        """Rotary position ids [B, T] of whole sequences: the batch's own, or what the attention rule has instead."""
        return self._build_mask(ids, torch.zeros_like(ids.targets, dtype=torch.bool)).position_ids(ids.position_ids)

    def _build_mask(self, ids: StackedIds, supervised: Tensor) -> AttentionMask:
        return AttentionMask.build(
            ids.modality_ids,
            ids.segment_ids,
            self.attention,
            supervised=supervised,
            image_tokens=self.config.resampler.num_latents,
        )

    def _hidden(
        self,
        inputs: Tensor,
        ids: StackedIds,
        media: Mapping[Modality, Tensor],
        *,
        mask: AttentionMask | None,
        caches: Sequence[LayerCache] | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        if self.input_embedder is None:
            hidden = inputs
        elif mask is None:
            hidden = self.input_embedder.token_embedding(inputs)  # a decode step: generated tokens are text
        else:
            hidden = self.input_embedder(inputs, ids.modality_ids, media)
        # a decode step has no mask: its position ids continue those of the prompt, which came from ``position_ids``
        position_ids = ids.position_ids if mask is None else mask.position_ids(ids.position_ids)
        cos, sin = self.rotary(position_ids, ids.segment_ids, hidden.dtype)
        layer_caches: Sequence[LayerCache | None] = [None] * len(self.layers) if caches is None else caches
        for layer, cache in zip(self.layers.values(), layer_caches, strict=True):
            if self.recompute and cache is None and torch.is_grad_enabled():
                # there is no dropout, so no RNG state to restore
                hidden = checkpoint(layer, hidden, cos, sin, mask=mask, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(hidden, cos, sin, mask=mask, cache=cache, lengths=lengths)
        return hidden


def tie_weights(lm_head: LMHead, embedding: TokenEmbedding) -> None:
    """Let the LM head use the embedding's tables as its weights."""
    lm_head.base.weight = embedding.base.weight
    if lm_head.added_tokens is not None and embedding.added_tokens is not None:
        lm_head.added_tokens.weight = embedding.added_tokens


TIED_PARAMETERS = {
    "lm_head.base.weight": "input_embedder.token_embedding.base.weight",
    "lm_head.added_tokens.weight": "input_embedder.token_embedding.added_tokens",
}
"""Parameters of a tied LM head -> the parameters they copy when the input embedder is on another pipeline rank."""


def global_names(stage: Stage) -> dict[str, str]:
    """Map a stage's parameter names to their names in the whole model, which do not depend on the partition."""
    copies = TIED_PARAMETERS if stage.config.decoder.tie_word_embeddings and stage.input_embedder is None else {}
    return {name: copies.get(name, name) for name, _ in stage.named_parameters()}


def build_stage(
    config: ModelConfig,
    layers: Sequence[int],
    *,
    attention: AttentionConfig,
    seed: int = 0,
    linears: LinearFactory | None = None,
    recompute: bool = False,
    plan: TrainingPlan = DEFAULT_PLAN,
) -> Stage:
    """Build the stage with these consecutive decoder layers, randomly initialized.

    The stage with layer 0 holds the input embedder, the one with the last layer the LM head. Parameters are created on
    torch's default device in its default dtype. Decoder, embedding and LM head are initialized as GPT-2's (Radford et
    al., 2019), encoder and resampler by torch's defaults; the weights do not depend on the parallel layout.
    A stage with a tied LM head and no input embedder holds a copy of the tables, which the engine keeps equal.

    plan  what trains, and the decoder's low-rank adapters; by default all but the vision encoder, without adapters
    """
    linears = linears or LocalLinears()
    decoder_layers: dict[int, DecoderLayer] = {}
    for index in layers:
        with seeded(seed, f"layers.{index}"):
            decoder_layers[index] = DecoderLayer(config.decoder, linears)
        if plan.lora is not None:
            with seeded(seed, f"layers.{index}.lora"):
                decoder_layers[index].add_adapters(config.decoder, plan.lora, linears)
    input_embedder = InputEmbedder(config, linears, seed=seed) if layers[0] == 0 else None
    lm_head = None
    if layers[-1] == config.decoder.num_layers - 1:
        with seeded(seed, "lm_head"):
            lm_head = LMHead(config.decoder, linears)
        if config.decoder.tie_word_embeddings and input_embedder is None:
            with seeded(seed, "input_embedder.token_embedding"):
                tie_weights(lm_head, TokenEmbedding(config.decoder, linears))
    stage = Stage(
        config,
        attention=attention,
        input_embedder=input_embedder,
        layers=decoder_layers,
        lm_head=lm_head,
        recompute=recompute,
    )
    set_trained(stage, global_names(stage), plan)
    return stage


def build_model(
    config: ModelConfig,
    *,
    attention: AttentionConfig,
    seed: int = 0,
    linears: LinearFactory | None = None,
    plan: TrainingPlan = DEFAULT_PLAN,
) -> Stage:
    """Build the whole model as one stage, like ``build_stage``."""
    layers = range(config.decoder.num_layers)
    return build_stage(config, layers, attention=attention, seed=seed, linears=linears, plan=plan)
