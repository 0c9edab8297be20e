"""A stage: the part of the model that one pipeline rank holds; the whole model is a stage with everything.

B rows, T tokens, N images, P patches, Q latents per image, D width, V columns of the logits.

For DeepSpeed's ZeRO-3, which gathers a module's own parameters around that module's forward: every parameter is used
in the forward of a module that owns it, modules take and return plain tensors (layouts and caches travel as keyword
arguments, which its hooks do not look at), and every parameter takes part in every forward pass, whatever the batch
holds: without an image the encoder and the resampler run on none, without a supervised token the head runs on no row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aki_megatron.attention import LayerCache, ModalityLayout
from aki_megatron.config.model import DecoderConfig, ModelConfig
from aki_megatron.flow import IGNORE, NO_SEGMENT, Modality
from aki_megatron.model.decoder import Block
from aki_megatron.model.linears import LinearFactory, PlainLinears
from aki_megatron.model.loss import token_loss_sum
from aki_megatron.model.resampler import PerceiverResampler
from aki_megatron.model.rotary import Rotary
from aki_megatron.model.vision import VisionEncoder

EMBEDDING_STD = 0.02
"""Standard deviation of new embedding rows (Phi-3's initializer_range, and AKI's for its added tokens)."""


class TokenEmbedding(nn.Module):
    """Token ids to vectors: a table, and rows of their own for the ids past ``base_tokens``."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory) -> None:
        super().__init__()
        self.base_tokens = config.base_tokens
        self.table = linears.embedding(config.vocab_rows, config.width, std=EMBEDDING_STD)
        self.extra = (
            nn.Parameter(torch.randn(config.extra_tokens, config.width) * EMBEDDING_STD)
            if config.extra_tokens
            else None
        )

    def forward(self, token_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]"""
        if self.extra is None:
            return self.table(token_ids)
        added = token_ids >= self.base_tokens
        vectors = self.table(token_ids.masked_fill(added, 0))
        places = added.flatten().nonzero().squeeze(-1)
        rows = F.embedding(token_ids.flatten()[places] - self.base_tokens, self.extra)
        return vectors.flatten(0, 1).index_copy(0, places, rows.to(vectors.dtype)).view_as(vectors)


def place_images(text: Tensor, images: Tensor, modality_ids: Tensor) -> Tensor:
    """Put image vectors [N, Q, D] into the IMAGE places of text [B, T, D], in row-major order.

    Raises ValueError where the number of places is not N * Q.
    """
    places = (modality_ids == Modality.IMAGE).flatten().nonzero().squeeze(-1)
    vectors = images.flatten(0, 1)
    if len(places) != len(vectors):
        raise ValueError(
            f"The batch has {len(places)} IMAGE places but {images.shape[0]} images of {images.shape[1]} latents each; "
            "both must come from the same samples."
        )
    return text.flatten(0, 1).index_copy(0, places, vectors.to(text.dtype)).view_as(text)


class Front(nn.Module):
    """What turns a batch into hidden states: frozen vision encoder, resampler, token embedding."""

    def __init__(self, config: ModelConfig, linears: LinearFactory) -> None:
        super().__init__()
        self.image_size = config.vision.image_size
        self.vision = VisionEncoder(config.vision).requires_grad_(False)
        self.resampler = PerceiverResampler(config.resampler, config.vision.width, config.decoder.width)
        self.embedding = TokenEmbedding(config.decoder, linears)

    def forward(self, token_ids: Tensor, modality_ids: Tensor, pixels: Tensor | None) -> Tensor:
        """Token and modality ids [B, T], pixels [N, 3, H, W] (None: no image) -> hidden [B, T, D]"""
        if pixels is None:
            pixels = torch.zeros(0, 3, self.image_size, self.image_size, device=token_ids.device)
        with torch.no_grad():
            features = self.vision(pixels)
        return place_images(self.embedding(token_ids), self.resampler(features), modality_ids)


class Head(nn.Module):
    """What turns hidden states into logits or the loss: last norm, head, rows for the ids past ``base_tokens``."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory) -> None:
        super().__init__()
        self.config = config
        std = config.width**-0.5
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.output = linears.head(config.width, config.vocab_rows, bias=config.head_bias, std=std)
        self.extra = None
        if config.extra_tokens:
            self.extra = PlainLinears().head(config.width, config.extra_tokens, bias=config.head_bias, std=std)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed loss, fp32 scalar, of hidden [B, T, D] at the places of targets [B, T] that are not IGNORE.

        Only those rows meet the head: in fine-tuning most places teach nothing.
        """
        rows = (targets != IGNORE).flatten().nonzero().squeeze(-1)
        return token_loss_sum(self.logits(hidden.flatten(0, 1)[rows]), targets.flatten()[rows])

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]; column i is token i, columns that no token uses are -inf."""
        hidden = self.norm(hidden)
        logits = self.output(hidden)
        base, unused = self.config.base_tokens, self.config.vocab_rows - self.config.num_tokens
        parts = [logits[..., :base]]
        if self.extra is not None:
            parts.append(self.extra(hidden))
        if unused:
            parts.append(logits.new_full((*logits.shape[:-1], unused), float("-inf")))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else logits


class Stage(nn.Module):
    """Front (first stage only), consecutive decoder layers, head (last stage only).

    ``blocks`` are keyed by their number in the whole model, so that names do not depend on the cut.
    """

    def __init__(
        self, config: ModelConfig, *, rule: str, front: Front | None, blocks: dict[int, Block], head: Head | None
    ) -> None:
        super().__init__()
        self.config = config
        self.rule = rule
        self.front = front
        self.blocks = nn.ModuleDict({str(number): block for number, block in blocks.items()})
        self.head = head
        self.rotary = Rotary(config.decoder.rope, config.decoder.head_width)
        if config.decoder.tie_embeddings and front is not None and head is not None:
            # Both modules own the one Parameter, so that ZeRO-3 gathers it around either forward. Stages that hold
            # only one of the two have copies; keeping those equal is the engine's work.
            head.output.weight = front.embedding.table.weight
            if head.extra is not None and front.embedding.extra is not None:
                head.extra.weight = front.embedding.extra

    def forward(self, inputs: Tensor, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        """One micro-batch.

        inputs  token ids [B, T] int64 on a stage with a front, hidden [B, T, D] otherwise
        ids     [B, T, 4] int32: modality, segment, position, target (flow.stack_ids)
        pixels  [N, 3, H, W], for a stage with a front; None: no image

        Returns the summed loss over supervised places (fp32 scalar) on a stage with a head, hidden otherwise.
        Raises LeakError where the attention rule would show a place what it has to predict.
        """
        targets = ids[..., 3]
        hidden = self._hidden(inputs, ids, pixels, layout=self._layout(ids, targets != IGNORE))
        return hidden if self.head is None else self.head(hidden, targets)

    def logits(
        self,
        inputs: Tensor,
        ids: Tensor,
        pixels: Tensor | None = None,
        caches: list[LayerCache] | None = None,
        *,
        places: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] for inference; with ``places`` [B] only those of one place per row, [B, V].

        Without caches: a whole sequence. With empty caches, one per layer of this stage: the prompts, one segment per
        row, right padded; keys and values are kept. With filled caches: one new token per row (T = 1), which sees
        everything its cache holds. The next token is taken to be generated after the last place of each segment.
        """
        assert self.head is not None, "logits need the stage that holds the head"
        layout = lengths = None
        if caches is None or caches[0].longest == 0:
            segment_ids = ids[..., 1]
            following = F.pad(segment_ids[:, 1:], (0, 1), value=NO_SEGMENT)
            last = (segment_ids != NO_SEGMENT) & (segment_ids != following)
            layout = self._layout(ids, last | (ids[..., 3] != IGNORE))
            lengths = (segment_ids != NO_SEGMENT).sum(dim=1)
        hidden = self._hidden(inputs, ids, pixels, layout=layout, caches=caches, lengths=lengths)
        if places is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), places]
        return self.head.logits(hidden)

    def _layout(self, ids: Tensor, scored: Tensor) -> ModalityLayout:
        return ModalityLayout.build(ids[..., 0], ids[..., 1], rule=self.rule, scored=scored)

    def _hidden(
        self,
        inputs: Tensor,
        ids: Tensor,
        pixels: Tensor | None,
        *,
        layout: ModalityLayout | None,
        caches: Sequence[LayerCache] | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        if self.front is None:
            hidden = inputs
        elif layout is None:
            hidden = self.front.embedding(inputs)  # a generated token is never an image
        else:
            hidden = self.front(inputs, ids[..., 0], pixels)
        cos, sin = self.rotary(ids[..., 2], ids[..., 1], hidden.dtype)
        memory: Sequence[LayerCache | None] = [None] * len(self.blocks) if caches is None else caches
        for block, cache in zip(self.blocks.values(), memory, strict=True):
            hidden = block(hidden, cos, sin, layout=layout, cache=cache, lengths=lengths)
        return hidden


def build_model(config: ModelConfig, *, rule: str, linears: LinearFactory | None = None) -> Stage:
    """The whole model as one stage, with new random weights on torch's default device, in its default dtype.

    The caller seeds. Text parts follow GPT-2's scheme; encoder and resampler keep torch's own initialization.
    """
    linears = linears or PlainLinears()
    return Stage(
        config,
        rule=rule,
        front=Front(config, linears),
        blocks={number: Block(config.decoder, linears) for number in range(config.decoder.layers)},
        head=Head(config.decoder, linears),
    )
