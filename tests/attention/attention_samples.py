"""Material for the attention tests: ids drawn at random, the rules as nested loops, a reference varlen kernel.

Letters: B rows, T tokens, H heads, d head width.
"""

import random
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from aki_megatron.attention.varlen_plan import VarlenCall
from aki_megatron.types import Modality

PAD, TEXT, RESPONSE, IMAGE, AUDIO = Modality.PAD, Modality.TEXT, Modality.RESPONSE, Modality.IMAGE, Modality.AUDIO
RULES = ("causal", "mma", "mma_general", "mixed", "cca")


def row_of(*runs: tuple[int, int]) -> list[int]:
    """A row of modality ids from (modality, count) runs."""
    return [modality for modality, count in runs for _ in range(count)]


def rectangle(*rows: list[list[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
    """Modality and segment ids of rows, each a list of segments, right padded."""
    width = width or max(sum(map(len, segments)) for segments in rows)
    modality = torch.zeros(len(rows), width, dtype=torch.int8)
    segment = torch.full((len(rows), width), -1, dtype=torch.int32)
    for b, segments in enumerate(rows):
        at = 0
        for number, ids in enumerate(segments):
            modality[b, at : at + len(ids)] = torch.tensor(ids, dtype=torch.int8)
            segment[b, at : at + len(ids)] = number
            at += len(ids)
    return modality, segment


def nobody(modality_ids: Tensor) -> Tensor:
    """No scored row."""
    return torch.zeros(modality_ids.shape, dtype=torch.bool)


@st.composite
def segments(draw: st.DrawFn, holes: bool) -> list[int]:
    """One segment: turns of prompt blocks and a response; images of 1, 4 or 9 places; PAD holes if asked for."""
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
def ids_of_rows(draw: st.DrawFn, holes: bool = False, most_rows: int = 3) -> tuple[Tensor, Tensor]:
    """Modality and segment ids of a small rectangle: packed or not, ragged, with empty rows; gaps with ``holes``."""
    rows = []
    for _ in range(draw(st.integers(1, most_rows))):
        row: list[tuple[int, int]] = []
        for number in range(draw(st.integers(0, 3))):
            row += [(modality, number) for modality in draw(segments(holes))]
            if holes:
                row += [(PAD, -1)] * draw(st.integers(0, 2))
        rows.append(row)
    width = max(1, *(len(row) for row in rows)) + draw(st.integers(0, 2))
    filled = [row + [(int(PAD), -1)] * (width - len(row)) for row in rows]
    table = torch.tensor(filled, dtype=torch.int32)
    return table[..., 0].to(torch.int8), table[..., 1].contiguous()


def square_images(modality_ids: Tensor, segment_ids: Tensor) -> bool:
    """Whether every run of image tokens, over holes, has a square number of places, as rule cca wants."""
    for modality, segment in zip(modality_ids.tolist(), segment_ids.tolist(), strict=True):
        live = [(m, s) for m, s in zip(modality, segment, strict=True) if m != PAD and s >= 0]
        run, before = 0, (-1, -1)
        for m, s in [*live, (-1, -1)]:
            if (m, s) == before:
                run += 1
                continue
            if before[0] == IMAGE and run not in (1, 4, 9, 16, 25):
                return False
            run, before = 1, (m, s)
    return True


def statement(modality: list[int], segment: list[int], rule: str, kept: Callable[[int], range]) -> list[list[bool]]:
    """A rule for one row as nested loops, written from its definition and from nothing else in the project.

    ``kept(n)`` says which of the n question columns of a turn an image sees under ``mma``.
    """
    size = len(modality)
    live = [m != PAD and s >= 0 for m, s in zip(modality, segment, strict=True)]
    turn, image, place_in_image = [-1] * size, [-1] * size, [-1] * size
    last: dict[int, int] = {}
    for i in range(size):
        if not live[i]:
            continue
        p = last.get(segment[i])
        fresh = p is None
        turn[i] = 0 if fresh else turn[p] + (modality[p] == RESPONSE and modality[i] != RESPONSE)
        if modality[i] == IMAGE:
            goes_on = not fresh and modality[p] == IMAGE and turn[p] == turn[i]
            image[i] = image[p] if goes_on else i
            place_in_image[i] = place_in_image[p] + 1 if goes_on else 0
        last[segment[i]] = i

    def same_turn(i: int, j: int) -> bool:
        return live[i] and live[j] and segment[i] == segment[j] and turn[i] == turn[j]

    @cache
    def question(turn_of: tuple[int, int]) -> list[int]:
        i, seen_image, columns = next(p for p in range(size) if live[p] and (segment[p], turn[p]) == turn_of), False, []
        for j in range(size):
            if same_turn(i, j):
                seen_image = seen_image or modality[j] == IMAGE
                if seen_image and modality[j] == TEXT:
                    columns.append(j)
        return columns

    @cache
    def ring(i: int) -> int:
        side = round(sum(image[j] == image[i] for j in range(size)) ** 0.5)
        r, c = divmod(place_in_image[i], side)
        return min(r, c, side - 1 - r, side - 1 - c)

    def allowed(i: int, j: int) -> bool:
        if segment[i] < 0 or segment[i] != segment[j] or not live[j]:
            return False
        if rule == "mma" and modality[i] == IMAGE and modality[j] == TEXT and j > i:
            columns = question((segment[i], turn[i]))
            return same_turn(i, j) and columns.index(j) in kept(len(columns))
        if rule == "mma_general" and same_turn(i, j) and modality[i] != modality[j]:
            return j <= i or RESPONSE not in (modality[i], modality[j])
        if rule in ("mixed", "cca") and live[i] and image[i] >= 0 and image[i] == image[j]:
            return rule == "mixed" or ring(j) <= ring(i)
        return j <= i

    return [[allowed(i, j) for j in range(size)] for i in range(size)]


def loops(modality_ids: Tensor, segment_ids: Tensor, rule: str, kept: Callable[[int], range] = range) -> Tensor:
    """The mask [B, T, T] by ``statement``."""
    rows = zip(modality_ids.tolist(), segment_ids.tolist(), strict=True)
    return torch.tensor([statement(modality, segment, rule, kept) for modality, segment in rows])


def conversation(rng: random.Random, turns: int, image: int, longest: int) -> list[int]:
    """A segment shaped like real samples: system text, image, question, answer, and more turns of text."""
    ids = row_of((TEXT, rng.randint(2, 6)), (IMAGE, image))
    for _ in range(turns):
        ids += row_of((TEXT, rng.randint(2, longest)), (RESPONSE, rng.randint(1, longest)))
    return ids


def tensors(batch: int, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v and a gradient, token-major, for heads = (query heads, key heads, head width)."""
    generator = torch.Generator().manual_seed(seed)
    query, key, width = heads
    return [
        torch.randn(batch, tokens, count, width, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
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
    """Variable-length attention from matrix products, bottom-right causal: what the CUDA kernel promises to do."""

    def _pieces(self, call: VarlenCall) -> list[tuple[slice, slice]]:
        rows, columns = call.cu_rows.tolist(), call.cu_columns.tolist()
        assert max(np.diff(rows)) == call.max_rows
        assert max(np.diff(columns)) == call.max_columns
        spans = zip(rows[:-1], rows[1:], columns[:-1], columns[1:], strict=True)
        return [(slice(a, b), slice(c, d)) for a, b, c, d in spans]

    def _scores(self, q: Tensor, k: Tensor, call: VarlenCall) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * q.shape[-1] ** -0.5
        rows, columns = scores.shape[1:]
        if call.causal:
            scores = scores.masked_fill(~torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows), -torch.inf)
        return scores

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        parts, lse = [], []
        for rows, columns in self._pieces(call):
            scores = self._scores(q[rows], k[columns], call)
            lse.append(scores.logsumexp(-1))
            values = v[columns].repeat_interleave(q.shape[1] // v.shape[1], 1)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        return torch.cat(parts), torch.cat(lse, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
        return self.forward(q, k, v, call)[0]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, columns in self._pieces(call):
            weights = (self._scores(q[rows], k[columns], call) - lse[:, rows, None]).exp()
            wide_k, wide_v = (x[columns].repeat_interleave(group, 1) for x in (k, v))
            dp = torch.einsum("qhd,khd->hqk", grad[rows], wide_v)
            ds = weights * (dp - (grad[rows] * out[rows]).sum(-1).t()[..., None]) * scale
            dq[rows] += torch.einsum("hqk,khd->qhd", ds, wide_k)
            dk[columns] += torch.einsum("hqk,qhd->khd", ds, q[rows]).unflatten(1, (-1, group)).sum(2)
            dv[columns] += torch.einsum("hqk,qhd->khd", weights, grad[rows]).unflatten(1, (-1, group)).sum(2)
        return dq, dk, dv
