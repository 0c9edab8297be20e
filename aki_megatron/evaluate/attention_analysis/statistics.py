"""Attention from image tokens to the words of questions, by category of words: of samples, benchmarks and all together.

L chosen layers, H query heads, K categories and, last, the constant instructions; M samples.

Of one sample, the mass of a category is the attention of an image position to all tokens of the category, mean over the
image positions. A token counts for an image position when it comes later and in the same turn: what a rule has to look
ahead for, so that all of it is exactly 0 under ``causal``, ``mixed`` and ``cca``. Over samples there are three
statistics:

mass        mean over samples; a sample without the category counts as 0, so the categories sum to the whole
per token   mass divided by the sample's tokens of the category; mean over the samples that have the category
text share  mass divided by that of all categories, instructions left out; mean over the samples where that is not 0
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aki_megatron.evaluate.attention_analysis.categories import INSTRUCTION

DIGITS = 6
"""Of the numbers in JSON."""

MAX_REASONS = 5
"""Reasons of samples that could not be used that are kept."""


@dataclass(frozen=True)
class SampleAttention:
    """One question.

    mass        [L, H, K + 1] fp32
    num_tokens  [K + 1] of each category, after the image; and the words they are of
    """

    key: str
    mass: Tensor
    num_tokens: Tensor
    num_words: Tensor


@dataclass
class AttentionStatistics:
    """Sums over the samples of one benchmark, or of several.

    categories  K names
    layers      L numbers of decoder layers
    """

    name: str
    categories: tuple[str, ...]
    layers: tuple[int, ...]
    num_heads: int
    num_samples: int = 0
    num_errors: int = 0
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (len(self.layers), self.num_heads, len(self.categories) + 1)
        self._mass = torch.zeros(shape, dtype=torch.float64)
        self._per_token = torch.zeros(shape[0], shape[2], dtype=torch.float64)
        self._share = torch.zeros(shape[0], shape[2] - 1, dtype=torch.float64)
        self._squares = torch.zeros(shape[2], dtype=torch.float64)
        self._num_with = torch.zeros(shape[2], dtype=torch.int64)
        self._num_with_share = torch.zeros(shape[0], dtype=torch.int64)
        self._words = torch.zeros(shape[2], dtype=torch.int64)
        self._tokens = torch.zeros(shape[2], dtype=torch.int64)

    def add(self, sample: SampleAttention) -> None:
        """Count one sample."""
        mass = sample.mass.double()
        by_layer = mass.mean(dim=1)
        has = sample.num_tokens > 0
        text = by_layer[:, :-1].sum(dim=1, keepdim=True)
        self.num_samples += 1
        self._mass += mass
        self._squares += by_layer.mean(dim=0) ** 2
        self._per_token += by_layer / sample.num_tokens.clamp(min=1)
        self._share += torch.where(text > 0, by_layer[:, :-1] / text, 0.0)
        self._num_with += has
        self._num_with_share += text[:, 0] > 0
        self._words += sample.num_words
        self._tokens += sample.num_tokens

    def add_error(self, reason: str) -> None:
        """Count a sample that could not be used."""
        self.num_errors += 1
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(reason)

    def merge(self, other: "AttentionStatistics") -> None:
        """Count all samples of another one as well."""
        assert (self.categories, self.layers, self.num_heads) == (other.categories, other.layers, other.num_heads)
        self.num_samples += other.num_samples
        self.num_errors += other.num_errors
        self.reasons = (self.reasons + other.reasons)[:MAX_REASONS]
        for name in ("_mass", "_per_token", "_share", "_squares", "_num_with", "_num_with_share", "_words", "_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def rows(self) -> tuple[str, ...]:
        """The categories, then the constant instructions."""
        return (*self.categories, INSTRUCTION)

    @property
    def mass_by_head(self) -> Tensor:
        """[L, H, K + 1]; nan without a sample."""
        return self._mass / (self.num_samples or torch.nan)

    @property
    def mass(self) -> Tensor:
        """[L, K + 1]"""
        return self.mass_by_head.mean(dim=1)

    @property
    def per_token(self) -> Tensor:
        """[L, K + 1]; nan where no sample has the category."""
        return self._per_token / self._num_with.where(self._num_with > 0, torch.nan)

    @property
    def share(self) -> Tensor:
        """[L, K]; nan where no sample has any mass."""
        counts = self._num_with_share[:, None]
        return self._share / counts.where(counts > 0, torch.nan)

    @property
    def standard_error(self) -> Tensor:
        """[K + 1] of the mean over layers of ``mass``; nan with fewer than two samples."""
        count = self.num_samples
        if count < 2:
            return torch.full_like(self._squares, torch.nan)
        mean = self.mass.mean(dim=0)
        variance = (self._squares / count - mean**2).clamp(min=0) * count / (count - 1)
        return (variance / count).sqrt()

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it; null where there is no number."""
        rows, named = self.rows, self._named
        return {
            "name": self.name,
            "samples": self.num_samples,
            "errors": self.num_errors,
            "first_errors": self.reasons,
            "words": dict(zip(rows, self._words.tolist(), strict=True)),
            "tokens": dict(zip(rows, self._tokens.tolist(), strict=True)),
            "samples_with": dict(zip(rows, self._num_with.tolist(), strict=True)),
            "mass": named(self.mass.mean(dim=0)),
            "mass_standard_error": named(self.standard_error),
            "mass_per_token": named(self.per_token.mean(dim=0)),
            "text_share": named(self.share.nanmean(dim=0)),
            "by_layer": [
                {"layer": layer, "mass": named(mass), "mass_per_token": named(token), "text_share": named(share)}
                for layer, mass, token, share in zip(self.layers, self.mass, self.per_token, self.share, strict=True)
            ],
            "mass_by_layer_and_head": {
                row: _rounded(self.mass_by_head[:, :, number]) for number, row in enumerate(rows)
            },
        }

    def _named(self, values: Tensor) -> dict[str, float | None]:
        return dict(zip(self.rows, _rounded(values), strict=False))


def _rounded(values: Tensor) -> Any:
    """Return nested lists; nan becomes None."""
    if values.dim() > 1:
        return [_rounded(line) for line in values]
    return [None if value != value else round(value, DIGITS) for value in values.tolist()]


def merged(found: Sequence[AttentionStatistics], name: str) -> AttentionStatistics:
    """Return the statistics of all samples together: each sample counts the same, whichever benchmark it is of."""
    first = found[0]
    total = AttentionStatistics(name, first.categories, first.layers, first.num_heads)
    for each in found:
        total.merge(each)
    return total
