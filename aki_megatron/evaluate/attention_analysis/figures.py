"""Charts of the attention analysis as PNGs."""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from aki_megatron.evaluate.attention_analysis.statistics import AttentionStatistics

COLORS = (
    "#3b6fd4", "#d97706", "#17803d", "#9333ea", "#b91c1c", "#0e7490", "#a16207", "#be185d", "#4d7c0f", "#475569",
    "#7c3aed",
)  # fmt: skip
MAX_LABEL_LENGTH = 18


def draw_categories(found: Sequence[AttentionStatistics]) -> bytes:
    """Return the chart like the paper's Fig. 6: bars for each category and benchmark, and the first one's layers.

    Of three panels the first is the summed mass, the second the mass per token, the third the share of the text. With
    several layers a fourth shows the summed mass of each layer, of the first of ``found``.
    """
    first = found[0]
    panels = [
        ("summed attention (mean over layers, heads, image tokens)", [each.mass.mean(dim=0) for each in found]),
        ("attention per token", [each.per_token.mean(dim=0) for each in found]),
        ("share of the attention to the question's words", [each.share.nanmean(dim=0) for each in found]),
    ]
    with_layers = len(first.layers) > 1
    figure = Figure(figsize=(11, 3.4 * (len(panels) + with_layers)), layout="constrained")
    axes = figure.subplots(len(panels) + with_layers, 1, squeeze=False).ravel()
    categories = np.arange(len(first.categories))
    width = 0.8 / len(found)
    for axis, (title, values) in zip(axes, panels, strict=False):
        for number, (each, value) in enumerate(zip(found, values, strict=True)):
            heights = np.nan_to_num(value[: len(categories)].numpy())
            label = f"{_plain(each.name)} ({each.num_samples})"
            shift = (number - (len(found) - 1) / 2) * width
            axis.bar(categories + shift, heights, width, color=COLORS[number % len(COLORS)], label=label)
        axis.set_xticks(categories, [_plain(name) for name in first.categories], fontsize=9)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(axis="y", alpha=0.25)
    if with_layers:
        for number, name in enumerate(first.categories):
            by_layer = first.mass[:, number].numpy()
            axes[-1].plot(first.layers, by_layer, "o-", markersize=3, color=COLORS[number], label=_plain(name))
        axes[-1].set_title(f"summed attention by layer, {_plain(first.name)}", loc="left", fontsize=10)
        axes[-1].set_xlabel("decoder layer")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[-1].grid(alpha=0.25)
        axes[-1].legend(fontsize=8, ncols=3)
    axes[0].legend(fontsize=8, ncols=4)
    return _png(figure)


def draw_word_map(values: Tensor, rows: Sequence[str], words: Sequence[str], title: str) -> bytes:
    """Return the heat map like the paper's Fig. 9: values [rows, words], each with its number."""
    size = (max(5.0, 2.0 + 0.62 * len(words)), 1.6 + 0.5 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    table = values.numpy()
    top = float(table.max()) if table.size else 0.0
    shade = Normalize(0.0, top or 1.0)
    axis.imshow(table, cmap="Blues", norm=shade, aspect="auto")
    axis.set_xticks(range(len(words)), [_plain(word) for word in words], rotation=45, ha="right", fontsize=9)
    axis.set_yticks(range(len(rows)), [_plain(row) for row in rows], fontsize=9)
    # numbers have one unit for the whole map, so that small values stay readable
    exponent = math.floor(math.log10(top)) if top > 0 else 0
    for row, column in np.ndindex(table.shape):
        dark = shade(table[row, column]) > 0.6
        text = f"{table[row, column] / 10.0**exponent:.1f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "#1f2937")
    unit = f" [1e{exponent}]" if exponent else ""
    axis.set_title(f"{_plain(title, 60)}{unit}", loc="left", fontsize=9)
    return _png(figure)


def _plain(text: str, limit: int = MAX_LABEL_LENGTH) -> str:
    """Return a text as matplotlib shows it as it is: short, without its math signs."""
    text = text.replace("$", r"\$")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()
