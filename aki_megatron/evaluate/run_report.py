"""Write report.html: training curves, val accuracies, example predictions, the attention mask of one sample."""

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from aki_megatron.evaluate.scores import Prediction, TaskScore

EXAMPLES_PER_TASK = 3

CURVES = ("loss", "grad_norm", "lr")
"""Metrics that the report plots, one panel each."""


@dataclass(frozen=True)
class RunRecord:
    """What a report shows of one run's training."""

    title: str
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    config: str
    """Content of config.yaml."""
    validations: Sequence[dict[str, Any]] = ()
    """Lines of validation.jsonl."""
    evaluations: Sequence[dict[str, Any]] = ()
    """Scores of benchmarks: ``step``, and ``scores`` by name."""

    @classmethod
    def load(
        cls,
        config_file: Path,
        metrics: list[dict[str, Any]],
        validations: Sequence[dict[str, Any]] = (),
        evaluations: Sequence[dict[str, Any]] = (),
    ) -> "RunRecord":
        """Read config.yaml; the title is the name of its folder."""
        return cls(config_file.parent.name, metrics, config_file.read_text(), validations, evaluations)


def write_report(
    path: Path,
    title: str,
    runs: Sequence[RunRecord],
    *,
    scores: Sequence[TaskScore] = (),
    predictions: Sequence[Prediction] = (),
    mask: tuple[bytes, str] | None = None,
) -> None:
    """Write one self-contained page.

    scores, predictions  shown where given, a few predictions of each task
    mask                 PNG of an attention mask and the sentence above it
    """
    template = Environment(loader=PackageLoader("aki_megatron.evaluate", "."), autoescape=True).get_template(
        "report.html.j2"
    )
    page = template.render(
        title=title,
        runs=[
            {
                "title": run.title,
                "summary": summarize(run.metrics) | summarize_validations(run.validations),
                "curves": _base64(plot_curves(run.metrics, run.validations)) if run.metrics else "",
                "validation": run.validations[-1] if run.validations else None,
                "evaluations": run.evaluations,
                "score_names": list(dict.fromkeys(name for each in run.evaluations for name in each["scores"])),
                "config": run.config,
            }
            for run in runs
        ],
        scores=scores,
        examples=_examples(predictions),
        mask=_base64(mask[0]) if mask else "",
        mask_note=mask[1] if mask else "",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def summarize(metrics: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a run's totals by their labels; empty where no step has been recorded."""
    if not metrics:
        return {}
    seconds = sum(line["seconds"] for line in metrics)
    tokens = sum(line["tokens"] for line in metrics)
    return {
        "steps": f"{metrics[-1]['step']:,}",
        "final loss (smoothed)": f"{_final_loss(metrics):.4f}",
        "tokens": f"{tokens:,}",
        "supervised tokens": f"{sum(line['supervised_tokens'] for line in metrics):,}",
        "images": f"{sum(line['images'] for line in metrics):,}",
        "tokens per second": f"{tokens / seconds:,.0f}",
        "time in steps": f"{seconds:,.0f} s",
        "skipped steps": f"{sum(line['skipped'] for line in metrics)}",
    }


def summarize_validations(validations: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the last and the lowest validation loss by their labels; empty without one."""
    finite = [line for line in validations if line["loss"] is not None]
    if not finite:
        return {}
    last, best = finite[-1], min(finite, key=lambda line: line["loss"])
    return {
        "last validation loss": f"{last['loss']:.4f} (step {last['step']:,})",
        "lowest validation loss": f"{best['loss']:.4f} (step {best['step']:,})",
    }


def plot_curves(metrics: Sequence[dict[str, Any]], validations: Sequence[dict[str, Any]] = ()) -> bytes:
    """Return a PNG of CURVES over the steps that were not skipped, with the losses of the validations."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    applied = [line for line in metrics if not line["skipped"]]
    steps = [line["step"] for line in applied]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(CURVES))
    for panel, name in zip(panels, CURVES, strict=True):
        values = [line[name] for line in applied]
        panel.plot(steps, values, linewidth=0.7, alpha=1.0 if name == "lr" else 0.35, color="#3b6fd4")
        if name != "lr":
            panel.plot(steps, _smooth(values), linewidth=1.6, color="#1e3a8a")
        if name == "loss":
            panel.set_yscale("log")
            points = [(line["step"], line["loss"]) for line in validations if line["loss"] is not None]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.0, color="#d97706", label="val")
                panel.legend(fontsize=8)
        panel.set_title(name, loc="left", fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Return the exponential moving average with bias correction, as Adam's."""
    average, total, smoothed = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed


def _final_loss(metrics: Sequence[dict[str, Any]]) -> float:
    """Return the smoothed loss at the end, without skipped steps; nan where every step was skipped."""
    return (_smooth([line["loss"] for line in metrics if not line["skipped"]]) or [float("nan")])[-1]


def _examples(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return the first few predictions of each task, with their images."""
    by_task: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_task[prediction.task].append(prediction)
    return [
        {
            "prediction": prediction,
            "images": [
                (_base64(Path(image).read_bytes()), "png" if image.endswith(".png") else "jpeg")
                for image in prediction.images
            ],
        }
        for group in by_task.values()
        for prediction in group[:EXAMPLES_PER_TASK]
    ]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
