"""Stage 0 of the embedded data: a small SigLIP encoder, taught to say what stands in each cell of a scene, then frozen.

A public run starts from SigLIP's published weights; the embedded scenes have no such encoder, so one is trained here.
One learned query per cell reads the patch features; its answers (kind, colour) are supervised by the captions. The
pictures are the decoded files of the caption shards, JPEG artefacts included, not the pixels as drawn.

N pictures, P patches, W width, C cells of a scene.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aki_megatron.config.model import VisionConfig
from aki_megatron.data.image import decode_image, normalize
from aki_megatron.data.shards import ShardIndex
from aki_megatron.engine.optimizer import learning_rate
from aki_megatron.model.vision import VisionEncoder
from aki_megatron.synthetic.questions import read_caption
from aki_megatron.synthetic.scenes import COLORS, GRID, IMAGE_PIXELS, KINDS
from aki_megatron.types import Picture

CELLS = GRID * GRID
DEMO_ENCODER = VisionConfig(
    image_size=IMAGE_PIXELS, patch_size=6, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=256
)
"""Four patches per cell: the sizes that configs/demo gives to model.vision."""

_EVALUATION_BATCH = 500


@dataclass(frozen=True)
class EncoderRecipe:
    """Length and rates of the training; AdamW, linear warm-up and cosine to a hundredth of the rate."""

    steps: int = 600
    batch: int = 128
    lr: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    beta2: float = 0.98
    seed: int = 0


@dataclass(frozen=True)
class Cells:
    """Pictures and what stands in their cells.

    labels  [N, C, 2] int64: kind and colour, 0 for an empty cell, else 1 + the index in KINDS and COLORS
    """

    pictures: list[Picture]
    labels: Tensor

    def pixels(self, numbers: list[int]) -> Tensor:
        """float32 [n, 3, H, W] as the encoder takes them."""
        return normalize([self.pictures[number] for number in numbers], IMAGE_PIXELS)


@dataclass(frozen=True)
class CellAccuracy:
    """Share of right answers: kind and colour over the occupied cells, whole cells over all, empty ones included."""

    kind: float
    color: float
    cell: float


class CellHead(nn.Module):
    """One query per cell attends to the patches; two linear layers name kind and colour. Used in stage 0 only."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.1 * torch.randn(CELLS, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.kind = nn.Linear(width, len(KINDS) + 1)
        self.color = nn.Linear(width, len(COLORS) + 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[N, P, W] -> logits of kinds [N, C, 9] and of colours [N, C, 6]"""
        queries = self.queries.expand(len(features), -1, -1)
        read, _ = self.attention(queries, features, features, need_weights=False)
        return self.kind(read), self.color(read)


def load_cells(root: Path, folder: str) -> Cells:
    """Pictures and captions of every tar in ``root/folder``. Raises DataError for what cannot be read."""
    index = ShardIndex([f"{folder}/{tar.name}" for tar in sorted((root / folder).glob("*.tar"))], root)
    pictures, labels = [], torch.zeros(len(index), CELLS, 2, dtype=torch.int64)
    for number in range(len(index)):
        caption = index.caption(number)
        pictures.append(decode_image(caption.image, IMAGE_PIXELS, key=caption.key))
        for thing in read_caption(caption.text).objects:
            cell = labels[number, thing.row * GRID + thing.column]
            cell[0], cell[1] = 1 + KINDS.index(thing.kind), 1 + COLORS.index(thing.color)
    index.close()
    return Cells(pictures, labels)


def train_encoder(
    cells: Cells, config: VisionConfig, recipe: EncoderRecipe, report: Callable[[int, float], None]
) -> tuple[VisionEncoder, CellHead]:
    """Train an encoder from random weights; ``report`` gets the number of steps done and the loss of the last.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder, head = VisionEncoder(config), CellHead(config.hidden_size, config.num_heads)
    trained = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        trained, lr=0.0, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
    )
    for step, chosen in enumerate(_batches(len(cells.pictures), recipe)):
        rate = learning_rate(
            step, lr=recipe.lr, min_lr=recipe.lr / 100, warmup_steps=recipe.warmup_steps, steps=recipe.steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        kinds, colors = head(encoder(cells.pixels(chosen)))
        labels = cells.labels[chosen]
        loss = F.cross_entropy(kinds.flatten(0, 1), labels[..., 0].flatten())
        loss = loss + F.cross_entropy(colors.flatten(0, 1), labels[..., 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step + 1, loss.item())
    return encoder, head


def _batches(number: int, recipe: EncoderRecipe) -> Iterator[list[int]]:
    """``recipe.steps`` batches of picture numbers, every picture once before any comes again."""
    generator = torch.Generator().manual_seed(recipe.seed)
    waiting: list[int] = []
    for _ in range(recipe.steps):
        while len(waiting) < recipe.batch:
            waiting += torch.randperm(number, generator=generator).tolist()
        yield waiting[: recipe.batch]
        del waiting[: recipe.batch]


@torch.no_grad()
def cell_accuracy(encoder: VisionEncoder, head: CellHead, cells: Cells) -> CellAccuracy:
    """How many cells of ``cells`` are named right."""
    found = []
    for start in range(0, len(cells.pictures), _EVALUATION_BATCH):
        numbers = list(range(start, min(start + _EVALUATION_BATCH, len(cells.pictures))))
        found.append(torch.stack([logits.argmax(-1) for logits in head(encoder(cells.pixels(numbers)))], dim=-1))
    right = torch.cat(found) == cells.labels
    occupied = cells.labels[..., 0] > 0
    kind, color = right[occupied].double().mean(0).tolist()
    return CellAccuracy(kind, color, right.all(-1).double().mean().item())
