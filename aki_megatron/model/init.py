"""Random initialization of each module by itself, so that initial weights do not depend on the parallel layout."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SEED_KEYS = {
    "input_embedder.vision_encoder": "front.vision",
    "input_embedder.resampler": "front.resampler",
    "input_embedder.token_embedding": "front.embedding",
    "layers": "blocks",
    "lm_head": "head",
}
"""Module name -> the string that is hashed with the seed. The strings are names of an earlier version and must not
change: with other strings every run would start from other weights."""


@contextmanager
def seeded(seed: int, module: str) -> Iterator[None]:
    """Seed torch's generator for the initialization of ``module``, and restore its state afterwards.

    Weights initialized inside depend on ``seed`` and the module's name only, not on the modules initialized before.
    """
    parent, dot, rest = module.partition(".")
    key = SEED_KEYS.get(module) or SEED_KEYS.get(parent, parent) + dot + rest
    number = int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        yield
