"""Choose next tokens from logits: the most likely one, or a random one.

B sequences, V columns of the logits. Filters and their order are those of transformers' generate: temperature, top_k,
top_p.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aki_megatron.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature  0: the most likely token; above, logits are divided by it
    top_k        draw among this many most likely tokens; 0: among all
    top_p        draw among the most likely tokens that together have this probability, at least one
    seed         of the draws; with the number of a sequence it decides them, whatever else is in the batch
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed, valid in (
            ("temperature", self.temperature, "0 or more", 0.0 <= self.temperature < float("inf")),
            ("top_k", self.top_k, "0 or more", self.top_k >= 0),
            ("top_p", self.top_p, "above 0 and at most 1", 0.0 < self.top_p <= 1.0),
            ("seed", self.seed, "0 or more and below 2^63", 0 <= self.seed < 2**63),
        ):
            if not valid:
                raise ConfigError(f"{name}={value} must be {allowed}.")


GREEDY = Sampling()


class TokenChooser:
    """The choices of one sequence; its random numbers depend on ``sampling.seed`` and ``number`` only."""

    def __init__(self, sampling: Sampling, number: int = 0) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + number) % 2**63)

    def choose(self, logits: Tensor) -> int:
        """Return the next token from logits [V]."""
        if self.sampling.temperature == 0.0:
            return int(logits.argmax())
        probabilities = filtered(logits[None].float(), self.sampling)[0].softmax(dim=-1).double().cpu()
        drawn = torch.rand((), dtype=torch.float64, generator=self._generator)
        total = probabilities.cumsum(dim=-1)
        token = int(torch.searchsorted(total, drawn * total[-1], right=True))
        return min(token, int(probabilities.nonzero()[-1]))


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return logits [B, V] over the temperature, -inf for tokens that may not be drawn."""
    scores = logits / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[..., -1:], float("-inf"))
    if sampling.top_p < 1.0:
        ascending, order = scores.sort(dim=-1)
        unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - sampling.top_p
        unlikely[..., -1] = False
        scores = scores.masked_fill(unlikely.scatter(-1, order, unlikely), float("-inf"))
    return scores
