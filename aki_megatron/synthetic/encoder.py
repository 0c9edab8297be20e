"""Train the demo's vision encoder: a small SigLIP encoder that recognises the object in each cell, then frozen.

A published run starts from SigLIP's published weights; there are none for the synthetic scenes, so they are trained
here. One learned query per cell attends to the patch features and classifies the cell's kind and colour; the labels
come from the captions. The images are the decoded files of the caption shards, JPEG artefacts included.

N images, P patches, D hidden size, C cells of a scene.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aki_megatron.config.model import VisionConfig
from aki_megatron.data.image import decode_image, normalize
from aki_megatron.data.shards import CaptionDataset
from aki_megatron.engine.optimizer import learning_rate
from aki_megatron.model.vision import VisionEncoder
from aki_megatron.synthetic.questions import parse_caption
from aki_megatron.synthetic.scenes import COLORS, GRID_SIZE, IMAGE_PIXELS, KINDS
from aki_megatron.types import DecodedImage

NUM_CELLS = GRID_SIZE * GRID_SIZE
DEMO_ENCODER = VisionConfig(
    image_size=IMAGE_PIXELS, patch_size=6, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=256
)
"""Four patches per cell: the sizes that configs/demo gives to model.vision."""

_EVALUATION_BATCH_SIZE = 500


@dataclass(frozen=True)
class EncoderRecipe:
    """Length and rates of the training; AdamW, linear warm-up and cosine decay to a hundredth of the rate."""

    steps: int = 600
    batch_size: int = 128
    lr: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    beta2: float = 0.98
    seed: int = 0


@dataclass(frozen=True)
class LabeledImages:
    """Images and the objects in their cells.

    labels  [N, C, 2] int64: kind and colour, 0 for an empty cell, else 1 + the index in KINDS and COLORS
    """

    images: list[DecodedImage]
    labels: Tensor

    def pixels(self, indices: list[int]) -> Tensor:
        """Return the images float32 [n, 3, H, W] as the encoder takes them."""
        return normalize([self.images[index] for index in indices], IMAGE_PIXELS)


@dataclass(frozen=True)
class CellAccuracy:
    """Fraction of correct predictions: kind and colour over occupied cells, both together over all cells."""

    kind: float
    color: float
    cell: float


class CellClassifier(nn.Module):
    """One query per cell attends to the patches; two linear layers classify kind and colour. For training only."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.1 * torch.randn(NUM_CELLS, hidden_size))
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.kind = nn.Linear(hidden_size, len(KINDS) + 1)
        self.color = nn.Linear(hidden_size, len(COLORS) + 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Classify features [N, P, D]; logits of kinds [N, C, 9] and of colours [N, C, 6]."""
        queries = self.queries.expand(len(features), -1, -1)
        attended, _ = self.attention(queries, features, features, need_weights=False)
        return self.kind(attended), self.color(attended)


def load_labeled_images(root: Path, folder: str) -> LabeledImages:
    """Read images and captions of every tar in ``root/folder``. Raises DataError for what cannot be read."""
    captions = CaptionDataset([f"{folder}/{tar.name}" for tar in sorted((root / folder).glob("*.tar"))], root)
    images, labels = [], torch.zeros(len(captions), NUM_CELLS, 2, dtype=torch.int64)
    for index in range(len(captions)):
        caption = captions.caption(index)
        images.append(decode_image(caption.image, IMAGE_PIXELS, key=caption.key))
        for item in parse_caption(caption.text).objects:
            labels[index, item.cell, 0] = 1 + KINDS.index(item.kind)
            labels[index, item.cell, 1] = 1 + COLORS.index(item.color)
    captions.close()
    return LabeledImages(images, labels)


def train_encoder(
    data: LabeledImages, config: VisionConfig, recipe: EncoderRecipe, progress: Callable[[int, float], None]
) -> tuple[VisionEncoder, CellClassifier]:
    """Train an encoder from random weights; ``progress`` gets the number of steps done and the loss of the last.

    The global random state is left unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder, classifier = VisionEncoder(config), CellClassifier(config.hidden_size, config.num_heads)
    parameters = [*encoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
    )
    for step, indices in enumerate(_batches(len(data.images), recipe)):
        rate = learning_rate(
            step, lr=recipe.lr, min_lr=recipe.lr / 100, warmup_steps=recipe.warmup_steps, steps=recipe.steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        kinds, colors = classifier(encoder(data.pixels(indices)))
        labels = data.labels[indices]
        loss = F.cross_entropy(kinds.flatten(0, 1), labels[..., 0].flatten())
        loss = loss + F.cross_entropy(colors.flatten(0, 1), labels[..., 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, loss.item())
    return encoder, classifier


def _batches(num_images: int, recipe: EncoderRecipe) -> Iterator[list[int]]:
    """Yield ``recipe.steps`` batches of image indices, in shuffled epochs; a batch may cross an epoch's end."""
    generator = torch.Generator().manual_seed(recipe.seed)
    pending: list[int] = []
    for _ in range(recipe.steps):
        while len(pending) < recipe.batch_size:
            pending += torch.randperm(num_images, generator=generator).tolist()
        yield pending[: recipe.batch_size]
        del pending[: recipe.batch_size]


@torch.no_grad()
def cell_accuracy(encoder: VisionEncoder, classifier: CellClassifier, data: LabeledImages) -> CellAccuracy:
    """Compute the accuracy over all cells of ``data``."""
    predicted = []
    for start in range(0, len(data.images), _EVALUATION_BATCH_SIZE):
        indices = list(range(start, min(start + _EVALUATION_BATCH_SIZE, len(data.images))))
        logits = classifier(encoder(data.pixels(indices)))
        predicted.append(torch.stack([of_attribute.argmax(-1) for of_attribute in logits], dim=-1))
    correct = torch.cat(predicted) == data.labels
    occupied = data.labels[..., 0] > 0
    kind, color = correct[occupied].double().mean(0).tolist()
    return CellAccuracy(kind, color, correct.all(-1).double().mean().item())
