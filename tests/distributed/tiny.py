"""A tiny model, uneven batches, and the plain training loop that every engine must equal.

The batches of a step are drawn whole (one list over all data ranks), so that any number of ranks trains on the same samples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aki_megatron.engine.optimizer import adamw, learning_rate
from aki_megatron.flow import IGNORE, NO_SEGMENT, Batch, Modality, stack_ids

TOKENS, QUERIES, PIXELS, VOCABULARY, WIDTH = 12, 4, 8, 31, 16
STEPS, MICROBATCHES, CLIP_NORM = 5, 4, 0.5
"""Steps compared, micro-batches per step over all ranks, and a norm that is exceeded in some steps."""
OPTIMIZER = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-5}


class StandIn(nn.Module):
    """Same call as the real model's stage, with a frozen encoder, a one-element, a one-row and an odd-sized parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(3 * PIXELS * PIXELS, WIDTH).requires_grad_(False)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.queries = nn.Parameter(torch.randn(1, QUERIES, WIDTH))
        self.gain = nn.Parameter(torch.ones(1))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("angles", torch.arange(TOKENS) * 0.1234567, persistent=False)

    def forward(self, token_ids: Tensor, ids: Tensor, pixels: Tensor) -> Tensor:
        """Summed loss over supervised places."""
        modality, targets = ids[..., 0], ids[..., 3].long()
        images = self.vision(pixels.flatten(1))[:, None] + self.queries
        text = self.embedding(token_ids)
        hidden = text.masked_scatter((modality == Modality.IMAGE)[..., None], images.to(text.dtype))
        hidden = hidden + self.angles.cos()[:, None].to(text.dtype)
        hidden = self.norm(hidden + self.gain * torch.tanh(self.mix(hidden.cumsum(1))))
        taught = targets != IGNORE
        logits = self.head(hidden[taught]).float()
        loss = nn.functional.cross_entropy(logits, targets[taught], reduction="sum") if taught.any() else logits.sum()
        return loss + 0.0 * images.float().sum()


def stand_in(seed: int = 0) -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(seed)
    return StandIn()


@dataclass(frozen=True)
class Trained:
    """What a run of STEPS steps leaves behind."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def draw_batch(step: int, number: int) -> Batch:
    """Micro-batch ``number`` of step ``step``: rows of different lengths and supervision.

    Number 1 of every step has no image, number 2 of odd steps no supervised token.
    """
    random = torch.Generator().manual_seed(1000 * step + number)
    rows = 2
    token_ids = torch.randint(0, VOCABULARY, (rows, TOKENS), generator=random)
    modality_ids = torch.full((rows, TOKENS), Modality.TEXT, dtype=torch.int8)
    segment_ids = torch.zeros(rows, TOKENS, dtype=torch.int32)
    targets = torch.full((rows, TOKENS), IGNORE)
    with_image = number != 1
    for row in range(rows):
        length = TOKENS - int(torch.randint(0, 4, (1,), generator=random))
        taught = 1 + int(torch.randint(0, 3, (1,), generator=random)) + number
        response = max(QUERIES + 1, length - taught)
        if with_image:
            modality_ids[row, :QUERIES] = Modality.IMAGE
        modality_ids[row, response:length] = Modality.RESPONSE
        modality_ids[row, length:] = Modality.PAD
        segment_ids[row, length:] = NO_SEGMENT
        if not (number == 2 and step % 2):
            targets[row, response - 1 : length - 1] = token_ids[row, response:length]
    positions = torch.arange(TOKENS, dtype=torch.int32).expand(rows, TOKENS).contiguous()
    pixels = torch.randn(rows if with_image else 0, 3, PIXELS, PIXELS, generator=random)
    return Batch(token_ids, modality_ids, segment_ids, positions, targets, pixels)


def draw_share(step: int, rank: int, ranks: int) -> list[Batch]:
    """The micro-batches of one rank."""
    return [draw_batch(step, number) for number in range(rank, MICROBATCHES, ranks)]


def rates(first: int = 0) -> Iterator[tuple[int, float]]:
    """Steps from ``first`` on, each with its learning rate."""
    for step in range(first, STEPS):
        yield step, learning_rate(step, lr=2e-2, min_lr=1e-3, warmup_steps=2, steps=STEPS)


def train_plainly(build: Callable[[], nn.Module]) -> Trained:
    """One process, no engine, no DeepSpeed: the plain twin."""
    model = build()
    optimizer = adamw(model, **OPTIMIZER)
    losses, norms = [], []
    for step, lr in rates():
        batches = draw_share(step, 0, 1)
        supervised = sum(batch.supervised_tokens for batch in batches)
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss = model(batch.token_ids, stack_ids(batch), batch.pixels)
            (loss / supervised).backward()
            total += loss.item()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        losses.append(total / supervised)
    return Trained(losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()})
