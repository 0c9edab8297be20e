"""Filters equal those of transformers; draws follow their probabilities."""

from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from aki_megatron.errors import ConfigError
from aki_megatron.evaluate.sampling import Sampling, TokenChooser, filtered


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50])
@pytest.mark.parametrize("top_p", [0.05, 0.7, 1.0])
def test_filters_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(filtered(logits, Sampling(temperature, top_k, top_p)), expected)


def test_draws_follow_the_probabilities_and_never_leave_the_filter() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, float("-inf"), 3.0])
    chooser = TokenChooser(Sampling(1.0, top_k=3, seed=1))
    counts = Counter(chooser.choose(logits) for _ in range(4000))
    assert set(counts) == {1, 2, 4}
    expected = torch.tensor([1.0, 2.0, 3.0]).softmax(0).tolist()
    for token, probability in zip((1, 2, 4), expected, strict=True):
        assert abs(counts[token] / 4000 - probability) < 0.03
    assert TokenChooser(Sampling()).choose(logits) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.* must be"):
        Sampling(**options)
