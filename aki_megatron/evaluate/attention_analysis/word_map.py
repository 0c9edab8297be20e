"""The map of entities and words, like the paper's Fig. 9: how much the tokens of each entity attend to each word.

The resampler gives latents no place in the picture, and the papers do not say how they map pixels to them. Here the
resampler's cross-attention does: an entity's row is a mean of the latents' attention to the words, each latent weighted
by how much it looks at the entity's patches. This is this project's construction.

E entities, W words, Q latents.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aki_megatron.evaluate.attention_analysis.entities import latent_weights
from aki_megatron.evaluate.attention_analysis.figures import draw_word_map
from aki_megatron.evaluate.attention_analysis.question import QuestionAttention

WHOLE_PICTURE = "(whole picture)"

CONSTRUCTION = (
    "An entity's row is the mean of the image latents' attention to each word (summed over the word's tokens, mean "
    "over heads and layers), weighted by the resampler's cross-attention of each latent to the entity's patches. That "
    "latents are placed in the picture in this way is this project's construction: the paper does not state its own. "
    f"The row {WHOLE_PICTURE} weights all latents the same: a row says something where it differs from that one."
)


@dataclass(frozen=True)
class WordMap:
    """``values`` [E + 1, W]: attention of each entity, and last of the whole picture, to each word."""

    entities: tuple[str, ...]
    words: tuple[str, ...]
    values: Tensor


def build_word_map(attention: QuestionAttention, entities: Mapping[str, Tensor]) -> WordMap:
    """Return the map of entities, given as coverage of patches [H, W]."""
    rows = [latent_weights(covered, attention.latent_patches) @ attention.latent_words for covered in entities.values()]
    rows.append(attention.latent_words.mean(dim=0))
    words = tuple(word.text for word in attention.words)
    return WordMap((*entities, WHOLE_PICTURE), words, torch.stack(rows))


def write_word_map(
    out: Path, found: WordMap, attention: QuestionAttention, conditions: Mapping[str, object]
) -> list[Path]:
    """Write entities.json and entities.png into a folder; return their paths.

    conditions  what the numbers depend on: model, image, question, ...
    """
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "construction": CONSTRUCTION,
        "conditions": {**conditions, "rule": attention.rule, "layers": list(attention.layers)},
        "words": [word.__dict__ for word in attention.words],
        "entities": list(found.entities),
        "attention": [[round(value, 8) for value in row] for row in found.values.tolist()],
    }
    text, chart = out / "entities.json", out / "entities.png"
    text.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    title = f"attention of entities to words, rule {attention.rule}"
    chart.write_bytes(draw_word_map(found.values, found.entities, found.words, title))
    return [text, chart]
