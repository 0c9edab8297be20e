"""A picture of who attends to whom: rows are the tokens that look, columns the tokens that are seen."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from aki_megatron.types import Modality

COLORS = {
    Modality.PAD: "#c7ccd6",
    Modality.TEXT: "#3b6fd4",
    Modality.RESPONSE: "#17803d",
    Modality.IMAGE: "#d97706",
    Modality.AUDIO: "#9333ea",
}
LABEL_LENGTH = 14
INCHES_PER_TOKEN = 0.19


@dataclass(frozen=True)
class MaskPanel:
    """One mask of a picture: bool [T, T], True where the row attends to the column."""

    title: str
    mask: Tensor


def _short(label: str) -> str:
    label = label.replace("\n", "\\n").replace("$", r"\$").strip()
    return label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 3] + "..."


def _paint(mask: Tensor, modality_ids: Sequence[int]) -> np.ndarray:
    """[T, T, 3]: a seen place has its column's colour, strong where the row looks ahead, others are white."""
    size = len(modality_ids)
    columns = np.array([to_rgb(COLORS[Modality(kind)]) for kind in modality_ids])
    ahead = np.triu(np.ones((size, size)), k=1)[..., None]
    strength = 0.45 + 0.55 * ahead
    seen = mask.cpu().numpy()[..., None]
    return np.where(seen, 1 - strength * (1 - columns[None]), 1.0)


def draw_masks(
    panels: Sequence[MaskPanel], modality_ids: Sequence[int], labels: Sequence[str], *, columns: int = 0
) -> bytes:
    """PNG of masks over one row of tokens; a strongly coloured square is a look ahead.

    modality_ids and labels have one entry per token, in the order of the masks' rows. ``columns`` panels stand side by
    side before the next line begins; 0 puts all on one line.
    """
    size = len(modality_ids)
    side = max(3.0, size * INCHES_PER_TOKEN)
    columns = columns or len(panels)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(columns * (side + 1.2), lines * (side + 1.4) + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for empty in axes[len(panels) :]:
        empty.set_axis_off()
    axes = axes[: len(panels)]
    names = [_short(label) for label in labels]
    for axis, panel in zip(axes, panels, strict=True):
        axis.imshow(_paint(panel.mask, modality_ids), interpolation="nearest")
        axis.set_title(panel.title, fontsize=11)
        axis.set_xticks(range(size), names, rotation=90, fontsize=6)
        axis.set_yticks(range(size), names, fontsize=6)
        axis.set_xticks(np.arange(-0.5, size), minor=True)
        axis.set_yticks(np.arange(-0.5, size), minor=True)
        axis.grid(which="minor", color="#e6e9ef", linewidth=0.4)
        axis.tick_params(which="both", length=0)
        for kind, tick, other in zip(modality_ids, axis.get_xticklabels(), axis.get_yticklabels(), strict=True):
            tick.set_color(COLORS[Modality(kind)])
            other.set_color(COLORS[Modality(kind)])
    kinds = [kind for kind in Modality if int(kind) in modality_ids]
    handles = [Patch(color=COLORS[kind], label=kind.name.lower()) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return buffer.getvalue()
