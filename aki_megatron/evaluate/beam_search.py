"""Beam search with a KV cache, as transformers' generate does it (early_stopping False, no sampling)."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aki_megatron.errors import ConfigError
from aki_megatron.evaluate.decoding import Decoder
from aki_megatron.model.stage import Stage
from aki_megatron.types import Batch


@dataclass
class _Search:
    """The search of one prompt: its running hypotheses, best first, and those that have ended, best first."""

    running: list[tuple[float, list[int]]] = field(default_factory=lambda: [(0.0, [])])
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    is_done: bool = False


def beam_search(
    stage: Stage,
    prompts: Batch,
    *,
    num_beams: int,
    stop_ids: Collection[int],
    max_new_tokens: int,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """Continue every prompt by its best hypothesis.

    num_beams       hypotheses kept after every token
    length_penalty  an ended hypothesis of n tokens, its stop id included, counts log probability / n ** length_penalty

    The other arguments and the result are those of ``generate``. Raises ConfigError for less than one beam.
    """
    if num_beams < 1:
        raise ConfigError(f"num_beams={num_beams} must be 1 or more.")
    searches = [_Search() for _ in prompts.token_ids]
    if max_new_tokens < 1:
        return [[] for _ in searches]
    decoder = Decoder(stage)
    logits = decoder.admit(prompts)
    while True:
        first, rows, tokens = 0, [], []
        for search in searches:
            count = 0 if search.is_done else len(search.running)
            if count:
                origins = _advance(
                    search,
                    logits[first : first + count],
                    num_beams,
                    frozenset(stop_ids),
                    max_new_tokens,
                    length_penalty,
                )
                rows += [first + origin for origin in origins]
                tokens += [hypothesis[-1] for _, hypothesis in search.running[: len(origins)]]
            first += count
        if not rows:
            return [_without_stop(search.ended[0][1], stop_ids) for search in searches]
        decoder.select(rows)
        logits = decoder.step(tokens)


def _advance(
    search: _Search,
    logits: Tensor,
    num_beams: int,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    length_penalty: float,
) -> list[int]:
    """Extend the running hypotheses by one token, from their logits [running, V].

    Returns for each new running hypothesis the number of the one it extends; empty when the search is done.
    """
    scores = torch.tensor([score for score, _ in search.running], dtype=logits.dtype, device=logits.device)
    total = (scores[:, None] + logits.log_softmax(dim=-1)).flatten()
    kept = min(max(2, 1 + len(stop_ids)) * num_beams, int(total.isfinite().sum()))
    best = total.topk(kept)
    length = len(search.running[0][1]) + 1
    running: list[tuple[float, list[int]]] = []
    origins: list[int] = []
    for rank, (score, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        origin, token = divmod(index, logits.shape[-1])
        hypothesis = [*search.running[origin][1], token]
        if token in stop_ids or length == max_new_tokens:
            if rank < num_beams:
                search.ended.append((score / length**length_penalty, hypothesis))
        elif len(running) < num_beams:
            running.append((score, hypothesis))
            origins.append(origin)
    search.ended = sorted(search.ended, key=lambda ended: -ended[0])[:num_beams]
    search.running = running
    worst_ended = search.ended[-1][0] if len(search.ended) == num_beams else float("-inf")
    search.is_done = not running or running[0][0] / length**length_penalty <= worst_ended
    return [] if search.is_done else origins


def _without_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens
