"""A figure of attention masks: one line per query token, one column per key token."""

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
MAX_LABEL_LENGTH = 14
INCHES_PER_TOKEN = 0.19


@dataclass(frozen=True)
class MaskPanel:
    """One mask of a figure: bool [T, T], True where the query attends to the key."""

    title: str
    mask: Tensor


def _shorten(label: str) -> str:
    label = label.replace("\n", "\\n").replace("$", r"\$").strip()
    return label if len(label) <= MAX_LABEL_LENGTH else label[: MAX_LABEL_LENGTH - 3] + "..."


def _colors(mask: Tensor, modality_ids: Sequence[int]) -> np.ndarray:
    """RGB [T, T, 3]: an attended pair has its key's colour, saturated where the key is later, others are white."""
    size = len(modality_ids)
    of_key = np.array([to_rgb(COLORS[Modality(modality)]) for modality in modality_ids])
    look_ahead = np.triu(np.ones((size, size)), k=1)[..., None]
    saturation = 0.45 + 0.55 * look_ahead
    return np.where(mask.cpu().numpy()[..., None], 1 - saturation * (1 - of_key[None]), 1.0)


def draw_masks(
    panels: Sequence[MaskPanel], modality_ids: Sequence[int], labels: Sequence[str], *, panels_per_line: int = 0
) -> bytes:
    """Return a PNG of masks over one sequence of tokens; a saturated square is a look-ahead.

    modality_ids     [T] and ``labels`` [T], in the order of the masks' queries
    panels_per_line  panels side by side; 0 puts all on one line
    """
    size = len(modality_ids)
    side = max(3.0, size * INCHES_PER_TOKEN)
    panels_per_line = panels_per_line or len(panels)
    lines = -(-len(panels) // panels_per_line)
    figure = Figure(figsize=(panels_per_line * (side + 1.2), lines * (side + 1.4) + 0.4), layout="constrained")
    axes = figure.subplots(lines, panels_per_line, squeeze=False).ravel()
    for empty in axes[len(panels) :]:
        empty.set_axis_off()
    axes = axes[: len(panels)]
    names = [_shorten(label) for label in labels]
    for axis, panel in zip(axes, panels, strict=True):
        axis.imshow(_colors(panel.mask, modality_ids), interpolation="nearest")
        axis.set_title(panel.title, fontsize=11)
        axis.set_xticks(range(size), names, rotation=90, fontsize=6)
        axis.set_yticks(range(size), names, fontsize=6)
        axis.set_xticks(np.arange(-0.5, size), minor=True)
        axis.set_yticks(np.arange(-0.5, size), minor=True)
        axis.grid(which="minor", color="#e6e9ef", linewidth=0.4)
        axis.tick_params(which="both", length=0)
        for modality, x_label, y_label in zip(
            modality_ids, axis.get_xticklabels(), axis.get_yticklabels(), strict=True
        ):
            x_label.set_color(COLORS[Modality(modality)])
            y_label.set_color(COLORS[Modality(modality)])
    present = [modality for modality in Modality if int(modality) in modality_ids]
    handles = [Patch(color=COLORS[modality], label=modality.name.lower()) for modality in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(present), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return buffer.getvalue()
