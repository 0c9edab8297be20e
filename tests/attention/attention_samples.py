"""Material for the attention tests: random ids, the rules as nested loops, reference attention and varlen kernels.

Letters: B sequences, T positions, H heads, d head_dim.
"""

import random
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.attention.varlen_plan import VarlenCall
from aki_megatron.config.attention import ATTENTION_RULES, AttentionConfig
from aki_megatron.types import Modality

PAD, TEXT, RESPONSE, IMAGE, AUDIO = Modality.PAD, Modality.TEXT, Modality.RESPONSE, Modality.IMAGE, Modality.AUDIO
RULES = tuple(ATTENTION_RULES)
CONFIGS = {name: AttentionConfig(rule=name) for name in RULES}
CAUSAL, MMA, MMA_GENERAL = CONFIGS["causal"], CONFIGS["mma"], CONFIGS["mma_general"]
MIXED, CCA = CONFIGS["mixed"], CONFIGS["cca"]
LOOK_AHEAD = [name for name, rule in ATTENTION_RULES.items() if rule.look_ahead != "none"]


def ids_of(*runs: tuple[int, int]) -> list[int]:
    """Modality ids from (modality, count) runs."""
    return [modality for modality, count in runs for _ in range(count)]


def batch_of(*sequences: list[list[int]], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Modality and segment ids [B, T] of sequences, each a list of segments, right padded."""
    length = length or max(sum(map(len, segments)) for segments in sequences)
    modality = torch.zeros(len(sequences), length, dtype=torch.int8)
    segment = torch.full((len(sequences), length), -1, dtype=torch.int32)
    for b, segments in enumerate(sequences):
        start = 0
        for number, ids in enumerate(segments):
            modality[b, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int8)
            segment[b, start : start + len(ids)] = number
            start += len(ids)
    return modality, segment


def unsupervised(modality_ids: Tensor) -> Tensor:
    """No supervised position."""
    return torch.zeros(modality_ids.shape, dtype=torch.bool)


def build_mask(ids: tuple[Tensor, Tensor], attention: AttentionConfig, image_tokens: int = 0) -> AttentionMask:
    """The mask of modality and segment ids in which nothing is supervised."""
    return AttentionMask.build(*ids, attention, supervised=unsupervised(ids[0]), image_tokens=image_tokens)


def attend_by_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's attention under any bool mask [B, T, T], leaking or not; queries that see nothing give 0."""
    empty = ~mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=(mask | empty)[:, None], enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.masked_fill(empty[:, None], 0.0)


@st.composite
def segments(draw: st.DrawFn, holes: bool) -> list[int]:
    """One segment: turns of prompt blocks and a response; images of 1, 4 or 9 tokens; PAD inside if ``holes``."""
    ids: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        blocks = [TEXT, IMAGE, AUDIO, TEXT, IMAGE] + ([PAD] if holes else [])
        for block in draw(st.lists(st.sampled_from(blocks), max_size=4)):
            if block == IMAGE and IMAGE in (ids[-1:] or [None]):
                continue  # neighbouring images are a case of their own, with image_tokens
            ids += [block] * (draw(st.sampled_from([1, 4, 9])) if block == IMAGE else draw(st.integers(1, 4)))
        ids += [RESPONSE] * draw(st.integers(0, 3))
    return ids


@st.composite
def random_ids(draw: st.DrawFn, holes: bool = False, max_sequences: int = 3) -> tuple[Tensor, Tensor]:
    """Modality and segment ids of a small batch: packed or not, ragged, with empty sequences; gaps with ``holes``."""
    sequences = []
    for _ in range(draw(st.integers(1, max_sequences))):
        sequence: list[tuple[int, int]] = []
        for number in range(draw(st.integers(0, 3))):
            sequence += [(modality, number) for modality in draw(segments(holes))]
            if holes:
                sequence += [(PAD, -1)] * draw(st.integers(0, 2))
        sequences.append(sequence)
    length = max(1, *(len(sequence) for sequence in sequences)) + draw(st.integers(0, 2))
    filled = [sequence + [(int(PAD), -1)] * (length - len(sequence)) for sequence in sequences]
    table = torch.tensor(filled, dtype=torch.int32)
    return table[..., 0].to(torch.int8), table[..., 1].contiguous()


def square_images(modality_ids: Tensor, segment_ids: Tensor) -> bool:
    """Whether every run of image tokens, across holes, has a square number of tokens, as rule cca requires."""
    for modality, segment in zip(modality_ids.tolist(), segment_ids.tolist(), strict=True):
        valid = [(m, s) for m, s in zip(modality, segment, strict=True) if m != PAD and s >= 0]
        run, before = 0, (-1, -1)
        for m, s in [*valid, (-1, -1)]:
            if (m, s) == before:
                run += 1
                continue
            if before[0] == IMAGE and run not in (1, 4, 9, 16, 25):
                return False
            run, before = 1, (m, s)
    return True


def mask_by_loops(modality: list[int], segment: list[int], rule: str, kept: Callable[[int], range]) -> list[list[bool]]:
    """The mask of one sequence as nested loops, written from the rule's definition and nothing else in the project.

    ``kept(n)`` says which of the n text tokens of a prompt an image sees under ``mma``.
    """
    size = len(modality)
    valid = [m != PAD and s >= 0 for m, s in zip(modality, segment, strict=True)]
    turn, image, cell = [-1] * size, [-1] * size, [-1] * size
    last: dict[int, int] = {}
    for i in range(size):
        if not valid[i]:
            continue
        p = last.get(segment[i])
        first = p is None
        turn[i] = 0 if first else turn[p] + (modality[p] == RESPONSE and modality[i] != RESPONSE)
        if modality[i] == IMAGE:
            continues = not first and modality[p] == IMAGE and turn[p] == turn[i]
            image[i] = image[p] if continues else i
            cell[i] = cell[p] + 1 if continues else 0
        last[segment[i]] = i

    def same_turn(i: int, j: int) -> bool:
        return valid[i] and valid[j] and segment[i] == segment[j] and turn[i] == turn[j]

    @cache
    def prompt_text(turn_of: tuple[int, int]) -> list[int]:
        i, media_before, text = next(p for p in range(size) if valid[p] and (segment[p], turn[p]) == turn_of), False, []
        for j in range(size):
            if same_turn(i, j):
                media_before = media_before or modality[j] in (IMAGE, AUDIO)
                if media_before and modality[j] == TEXT:
                    text.append(j)
        return text

    @cache
    def ring(i: int) -> int:
        side = round(sum(image[j] == image[i] for j in range(size)) ** 0.5)
        r, c = divmod(cell[i], side)
        return min(r, c, side - 1 - r, side - 1 - c)

    def allowed(i: int, j: int) -> bool:
        if segment[i] < 0 or segment[i] != segment[j] or not valid[j]:
            return False
        if rule == "mma" and modality[i] in (IMAGE, AUDIO) and modality[j] == TEXT and j > i:
            text = prompt_text((segment[i], turn[i]))
            return same_turn(i, j) and text.index(j) in kept(len(text))
        if rule == "mma_general" and same_turn(i, j) and modality[i] != modality[j]:
            return j <= i or RESPONSE not in (modality[i], modality[j])
        if rule in ("mixed", "cca") and valid[i] and image[i] >= 0 and image[i] == image[j]:
            return rule == "mixed" or ring(j) <= ring(i)
        return j <= i

    return [[allowed(i, j) for j in range(size)] for i in range(size)]


def masks_by_loops(
    modality_ids: Tensor, segment_ids: Tensor, rule: str, kept: Callable[[int], range] = range
) -> Tensor:
    """The mask [B, T, T] by ``mask_by_loops``."""
    sequences = zip(modality_ids.tolist(), segment_ids.tolist(), strict=True)
    return torch.tensor([mask_by_loops(modality, segment, rule, kept) for modality, segment in sequences])


def conversation(rng: random.Random, turns: int, image: int, longest: int) -> list[int]:
    """A segment shaped like real samples: system text, image, question, answer, and more turns of text."""
    ids = ids_of((TEXT, rng.randint(2, 6)), (IMAGE, image))
    for _ in range(turns):
        ids += ids_of((TEXT, rng.randint(2, longest)), (RESPONSE, rng.randint(1, longest)))
    return ids


def tensors(batch: int, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v and a gradient, token-major, for heads = (query heads, key heads, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    query, key, head_dim = heads
    return [
        torch.randn(batch, tokens, count, head_dim, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for count in (query, key, key, query)
    ]


def with_gradients(run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, dq, dk, dv of ``run(q, k, v)``."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def error(got: Tensor, wanted: Tensor, scale: float = 0.0) -> float:
    """Relative L2 error in float64; a vanishing ``wanted`` is measured against ``scale`` instead."""
    return float((got.double() - wanted.double()).norm() / max(float(wanted.double().norm()), scale, 1e-300))


class ReferenceVarlen:
    """Variable-length attention from matrix products, bottom-right causal: the specification of the CUDA kernel."""

    def _blocks(self, call: VarlenCall) -> list[tuple[slice, slice]]:
        queries, keys = call.cu_queries.tolist(), call.cu_keys.tolist()
        assert max(np.diff(queries)) == call.max_queries
        assert max(np.diff(keys)) == call.max_keys
        spans = zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True)
        return [(slice(a, b), slice(c, d)) for a, b, c, d in spans]

    def _scores(self, q: Tensor, k: Tensor, call: VarlenCall) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * q.shape[-1] ** -0.5
        num_queries, num_keys = scores.shape[1:]
        if call.causal:
            scores = scores.masked_fill(
                ~torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries), -torch.inf
            )
        return scores

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        parts, lse = [], []
        for queries, keys in self._blocks(call):
            scores = self._scores(q[queries], k[keys], call)
            lse.append(scores.logsumexp(-1))
            values = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        return torch.cat(parts), torch.cat(lse, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
        return self.forward(q, k, v, call)[0]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys in self._blocks(call):
            weights = (self._scores(q[queries], k[keys], call) - lse[:, queries, None]).exp()
            wide_k, wide_v = (x[keys].repeat_interleave(group, 1) for x in (k, v))
            dp = torch.einsum("qhd,khd->hqk", grad[queries], wide_v)
            ds = weights * (dp - (grad[queries] * out[queries]).sum(-1).t()[..., None]) * scale
            dq[queries] += torch.einsum("hqk,khd->qhd", ds, wide_k)
            dk[keys] += torch.einsum("hqk,qhd->khd", ds, q[queries]).unflatten(1, (-1, group)).sum(2)
            dv[keys] += torch.einsum("hqk,qhd->khd", weights, grad[queries]).unflatten(1, (-1, group)).sum(2)
        return dq, dk, dv
