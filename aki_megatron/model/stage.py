"""A stage: the part of the model that one pipeline rank holds; the whole model is a stage with everything.

B rows, T tokens, N images, P patches, Q latents per image, D width, V columns of the logits, R rows that teach.

Every parameter takes part in every forward pass, whatever the batch holds: without an image the encoder and the
resampler run on none, without a supervised token the head runs on no row. So the ranks that share a parameter always
agree on the collectives they owe.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aki_megatron.attention import AttentionMask, LayerCache
from aki_megatron.config.model import DecoderConfig, ModelConfig
from aki_megatron.model.decoder import Block
from aki_megatron.model.linears import LinearFactory, LocalLinears
from aki_megatron.model.resampler import PerceiverResampler
from aki_megatron.model.rotary import Rotary
from aki_megatron.model.vision import VisionEncoder
from aki_megatron.types import IGNORE, NO_SEGMENT, Modality

EMBEDDING_STD = 0.02
"""Standard deviation of new embedding rows (Phi-3's initializer_range, and AKI's for its added tokens)."""


@contextmanager
def seeded(seed: int, part: str) -> Iterator[None]:
    """Draw the weights of a part of the model: they depend on the seed and the part's name, on nothing drawn before."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{part}".encode()).digest()[:7])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        yield


class TokenEmbedding(nn.Module):
    """Token ids to vectors: a table, and rows of their own for the ids past ``vocab_size``."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.table = linears.embedding(config.padded_vocab_size, config.hidden_size, std=EMBEDDING_STD)
        self.extra = (
            nn.Parameter(torch.randn(config.num_added_tokens, config.hidden_size) * EMBEDDING_STD)
            if config.num_added_tokens
            else None
        )

    def forward(self, token_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]"""
        if self.extra is None:
            return self.table(token_ids)
        added = token_ids >= self.vocab_size
        vectors = self.table(token_ids.masked_fill(added, 0))
        places = added.flatten().nonzero().squeeze(-1)
        rows = F.embedding(token_ids.flatten()[places] - self.vocab_size, self.extra)
        return vectors.flatten(0, 1).index_copy(0, places, rows.to(vectors.dtype)).view_as(vectors)


def scatter_image_embeds(text: Tensor, images: Tensor, modality_ids: Tensor) -> Tensor:
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


class InputEmbedder(nn.Module):
    """What turns a batch into hidden states: frozen vision encoder, resampler, token embedding."""

    def __init__(self, config: ModelConfig, linears: LinearFactory, *, seed: int) -> None:
        super().__init__()
        self.image_size = config.vision.image_size
        with seeded(seed, "front.vision"):
            self.vision = VisionEncoder(config.vision).requires_grad_(False)
        with seeded(seed, "front.resampler"):
            self.resampler = PerceiverResampler(config.resampler, config.vision.hidden_size, config.decoder.hidden_size)
        with seeded(seed, "front.embedding"):
            self.embedding = TokenEmbedding(config.decoder, linears)

    def forward(self, token_ids: Tensor, modality_ids: Tensor, pixels: Tensor | None) -> Tensor:
        """Token and modality ids [B, T], pixels [N, 3, H, W] (None: no image) -> hidden [B, T, D]"""
        if pixels is None:
            pixels = torch.zeros(0, 3, self.image_size, self.image_size, device=token_ids.device)
        with torch.no_grad():
            features = self.vision(pixels)
        return scatter_image_embeds(self.embedding(token_ids), self.resampler(features), modality_ids)


class Head(nn.Module):
    """What turns hidden states into logits or the loss: last norm, head, rows for the ids past ``vocab_size``."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory) -> None:
        super().__init__()
        self.config = config
        self.linears = linears
        self.words = linears.words(config.padded_vocab_size)
        std = config.hidden_size**-0.5
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.output = linears.head(config.hidden_size, config.padded_vocab_size, bias=config.lm_head_bias, std=std)
        self.extra = None
        if config.num_added_tokens:
            self.extra = LocalLinears().head(
                config.hidden_size, config.num_added_tokens, bias=config.lm_head_bias, std=std
            )

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed loss, fp32 scalar, of hidden [B, T, D] at the places of targets [B, T] that are not IGNORE.

        Only those rows meet the head: in fine-tuning most places teach nothing.
        """
        rows = (targets != IGNORE).flatten().nonzero().squeeze(-1)
        return self.linears.loss_sum(self.logits(hidden.flatten(0, 1)[rows]), targets.flatten()[rows].long())

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]; column i is the token self.words[i], columns that no token uses are -inf."""
        hidden = self.linears.shared(self.norm(hidden))
        logits = self.output(hidden)
        base, total = self.config.vocab_size, self.config.total_vocab_size
        first, last = self.words.start, self.words.stop
        parts = [logits[..., : max(0, min(last, base) - first)]]
        if self.extra is not None:
            # every process has all rows of these few tokens and uses those that are among its words
            weight = self.linears.shared(self.extra.weight)
            bias = None if self.extra.bias is None else self.linears.shared(self.extra.bias)
            added = F.linear(hidden, weight, bias)
            parts.append(added[..., max(0, first - base) : max(0, min(last, total) - base)])
        if unused := max(0, last - max(first, total)):
            parts.append(logits.new_full((*logits.shape[:-1], unused), float("-inf")))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else logits


class Stage(nn.Module):
    """InputEmbedder (first stage only), consecutive decoder layers, head (last stage only).

    ``blocks`` are keyed by their number in the whole model, so that names do not depend on the cut. With ``recompute``
    training keeps only the input of each layer and runs the layer again in the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rule: str,
        front: InputEmbedder | None,
        blocks: dict[int, Block],
        head: Head | None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.rule = rule
        self.recompute = recompute
        self.front = front
        self.blocks = nn.ModuleDict({str(number): block for number, block in blocks.items()})
        self.head = head
        self.rotary = Rotary(config.decoder.rope, config.decoder.head_dim)
        if config.decoder.tie_word_embeddings and front is not None and head is not None:
            tie(head, front.embedding)

    def layout(self, ids: Tensor) -> AttentionMask:
        """Who may attend to whom in a micro-batch with these ids [B, T, 4], in training.

        Raises LeakError where the attention rule would show a place what it has to predict.
        """
        return self._layout(ids, ids[..., 3] != IGNORE)

    def forward(
        self, inputs: Tensor, ids: Tensor, pixels: Tensor | None = None, *, layout: AttentionMask | None = None
    ) -> Tensor:
        """One micro-batch.

        inputs  token ids [B, T] int64 on a stage with a front, hidden [B, T, D] otherwise
        ids     [B, T, 4] int32: modality, segment, position, target (flow.stack_ids)
        pixels  [N, 3, H, W], for a stage with a front; None: no image
        layout  what ``layout(ids)`` returns; None: built here

        Returns the summed loss over supervised places (fp32 scalar) on a stage with a head, hidden otherwise.
        Raises LeakError where the attention rule would show a place what it has to predict.
        """
        hidden = self._hidden(inputs, ids, pixels, layout=self.layout(ids) if layout is None else layout)
        return hidden if self.head is None else self.head(hidden, ids[..., 3])

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

    def _layout(self, ids: Tensor, scored: Tensor) -> AttentionMask:
        return AttentionMask.build(ids[..., 0], ids[..., 1], rule=self.rule, scored=scored)

    def _hidden(
        self,
        inputs: Tensor,
        ids: Tensor,
        pixels: Tensor | None,
        *,
        layout: AttentionMask | None,
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
            if self.recompute and cache is None and torch.is_grad_enabled():
                # no dropout, no random numbers to bring back
                hidden = checkpoint(
                    block, hidden, cos, sin, layout=layout, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = block(hidden, cos, sin, layout=layout, cache=cache, lengths=lengths)
        return hidden


def tie(head: Head, embedding: TokenEmbedding) -> None:
    """Let a head use the tables of an embedding as its own."""
    head.output.weight = embedding.table.weight
    if head.extra is not None and embedding.extra is not None:
        head.extra.weight = embedding.extra


TIED = {"head.output.weight": "front.embedding.table.weight", "head.extra.weight": "front.embedding.extra"}
"""Parameters of a tied head, and what they are copies of where the front is on another stage."""


def global_names(stage: Stage) -> dict[str, str]:
    """A stage's parameter names and the names they have in the whole model, which no cut changes."""
    copies = TIED if stage.config.decoder.tie_word_embeddings and stage.front is None else {}
    return {name: copies.get(name, name) for name, _ in stage.named_parameters()}


def build_stage(
    config: ModelConfig,
    layers: Sequence[int],
    *,
    rule: str,
    seed: int = 0,
    linears: LinearFactory | None = None,
    recompute: bool = False,
) -> Stage:
    """The stage with these consecutive decoder layers; the first layer brings the front, the last the head.

    New random weights, on torch's default device and in its default dtype: text parts follow GPT-2's scheme, encoder
    and resampler keep torch's own initialization. They do not depend on which stages or shares the model is cut into.
    A stage with a tied head and no front has a copy of the tables; keeping the two equal is the engine's work.
    """
    linears = linears or LocalLinears()
    blocks: dict[int, Block] = {}
    for number in layers:
        with seeded(seed, f"blocks.{number}"):
            blocks[number] = Block(config.decoder, linears)
    front = InputEmbedder(config, linears, seed=seed) if layers[0] == 0 else None
    head = None
    if layers[-1] == config.decoder.num_layers - 1:
        with seeded(seed, "head"):
            head = Head(config.decoder, linears)
        if config.decoder.tie_word_embeddings and front is None:
            with seeded(seed, "front.embedding"):
                tie(head, TokenEmbedding(config.decoder, linears))
    return Stage(config, rule=rule, front=front, blocks=blocks, head=head, recompute=recompute)


def build_model(config: ModelConfig, *, rule: str, seed: int = 0, linears: LinearFactory | None = None) -> Stage:
    """The whole model as one stage; see build_stage."""
    return build_stage(config, range(config.decoder.num_layers), rule=rule, seed=seed, linears=linears)
