"""report.html: loss curves, accuracies beside the majority answer, sample pictures, the mask of one sample."""

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from aki_megatron.evaluate.scores import Answer, TaskScore

CARDS_PER_TASK = 3


@dataclass(frozen=True)
class RunRecord:
    """What a report needs of one run."""

    title: str
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    config: str
    """config.yaml."""


def encoded(data: bytes) -> str:
    """Base64 text, as an inline picture wants it."""
    return base64.b64encode(data).decode("ascii")


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average without the pull of its start."""
    average, total, out = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        out.append(average / total)
    return out


def curves(metrics: Sequence[dict[str, Any]]) -> bytes:
    """PNG of loss, gradient norm and learning rate over the steps that were not skipped."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    taken = [line for line in metrics if not line["skipped"]]
    steps = [line["step"] for line in taken]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, name in zip(panels, ("loss", "grad_norm", "lr"), strict=True):
        values = [line[name] for line in taken]
        panel.plot(steps, values, linewidth=0.7, alpha=1.0 if name == "lr" else 0.35, color="#3b6fd4")
        if name != "lr":
            panel.plot(steps, smooth(values), linewidth=1.6, color="#1e3a8a")
        if name == "loss":
            panel.set_yscale("log")
        panel.set_title(name, loc="left", fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def final_loss(metrics: Sequence[dict[str, Any]]) -> float:
    """Smoothed loss at the end, skipped steps left out; nan where every step was skipped."""
    return (smooth([line["loss"] for line in metrics if not line["skipped"]]) or [float("nan")])[-1]


def summary(metrics: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The figures of a run that a reader looks for first."""
    if not metrics:
        return {}
    seconds = sum(line["seconds"] for line in metrics)
    tokens = sum(line["tokens"] for line in metrics)
    return {
        "steps": f"{metrics[-1]['step']:,}",
        "final loss (smoothed)": f"{final_loss(metrics):.4f}",
        "tokens": f"{tokens:,}",
        "supervised tokens": f"{sum(line['supervised_tokens'] for line in metrics):,}",
        "images": f"{sum(line['images'] for line in metrics):,}",
        "tokens per second": f"{tokens / seconds:,.0f}",
        "time in steps": f"{seconds:,.0f} s",
        "skipped steps": f"{sum(line['skipped'] for line in metrics)}",
    }


def cards(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The first few answers of each task, with their pictures."""
    by_task: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_task[answer.task].append(answer)
    chosen = [answer for group in by_task.values() for answer in group[:CARDS_PER_TASK]]
    return [
        {
            "task": answer.task,
            "question": answer.question,
            "gold": answer.gold,
            "given": answer.given,
            "correct": answer.correct,
            "picture": encoded(Path(answer.image).read_bytes()) if answer.image else "",
            "kind": "png" if answer.image and answer.image.endswith(".png") else "jpeg",
        }
        for answer in chosen
    ]


def write_report(
    path: Path,
    title: str,
    runs: Sequence[RunRecord],
    *,
    scores: Sequence[TaskScore] = (),
    answers: Sequence[Answer] = (),
    mask: tuple[bytes, str] | None = None,
) -> None:
    """Write one self-contained page. ``mask`` is a PNG and the sentence above it."""
    template = Environment(loader=PackageLoader("aki_megatron.evaluate", "."), autoescape=True).get_template(
        "report.html.j2"
    )
    page = template.render(
        title=title,
        runs=[
            {
                "title": run.title,
                "summary": summary(run.metrics),
                "curves": encoded(curves(run.metrics)) if run.metrics else "",
                "config": run.config,
            }
            for run in runs
        ],
        scores=scores,
        cards=cards(answers),
        mask=encoded(mask[0]) if mask else "",
        mask_note=mask[1] if mask else "",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
