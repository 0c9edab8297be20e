"""Scores and the report that shows them."""

import re
from pathlib import Path

import torch

from aki_megatron.evaluate.mask_figure import MaskPanel, draw_masks
from aki_megatron.evaluate.run_report import RunRecord, write_report
from aki_megatron.evaluate.scores import Prediction, score_by_task
from aki_megatron.types import Modality

PNG = b"\x89PNG"


def predictions() -> list[Prediction]:
    references = ["red", "red", "red", "blue"]
    generated = ["red", " Red ", "blue", "blue"]
    pairs = zip(references, generated, strict=True)
    return [Prediction(f"t/{i}", "color", f"q{i}", r, g, []) for i, (r, g) in enumerate(pairs)]


def test_accuracy_and_majority_baseline_are_computed_per_task() -> None:
    more = [*predictions(), Prediction("u/0", "count", "how many <b>?", "2", "3", [])]
    color, count = score_by_task(more)
    assert (color.task, color.num_questions, color.accuracy, color.majority_baseline, color.majority_answer) == (
        "color", 4, 75.0, 75.0, "red",
    )  # fmt: skip
    assert (count.accuracy, count.majority_baseline) == (0.0, 100.0)
    assert 42 < color.margin < 43


def test_the_report_shows_curves_scores_images_and_the_mask(tmp_path: Path) -> None:
    image = tmp_path / "scene.png"
    image.write_bytes(PNG)
    shown = [*predictions(), Prediction("u/0", "count", "how many <b>?", "2", "3", [str(image)])]
    metrics = [
        {"step": s, "loss": 1 / s, "grad_norm": 1.0, "lr": 0.1, "supervised_tokens": 3, "tokens": 10, "images": 1,
         "seconds": 0.5, "skipped": False} for s in range(1, 9)
    ]  # fmt: skip
    modality_ids = [Modality.TEXT, Modality.IMAGE, Modality.TEXT, Modality.RESPONSE]
    mask = draw_masks([MaskPanel("causal", torch.ones(4, 4).tril().bool())], modality_ids, ["a", "$", "c", "d"])
    assert mask.startswith(PNG)
    out = tmp_path / "report.html"
    runs = [RunRecord("sft", metrics, "run:\n  dir: x\n"), RunRecord("later", [], "")]
    write_report(out, "AKI", runs, scores=score_by_task(shown), predictions=shown, mask=(mask, "rule causal"))
    page = out.read_text()
    assert "75.0" in page and "majority" in page and "rule causal" in page
    assert "how many &lt;b&gt;?" in page  # text of a dataset is never markup
    assert re.search(r"tokens per second</td><td class=\"number\">20<", page)
    assert "No optimizer step has been recorded yet" in page
    assert page.count("data:image/png;base64,") == 3
