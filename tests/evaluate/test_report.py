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


def test_the_report_shows_validations(tmp_path: Path) -> None:
    metrics = [
        {"step": s, "loss": 1 / s, "grad_norm": 1.0, "lr": 0.1, "supervised_tokens": 3, "tokens": 10, "images": 1,
         "seconds": 0.5, "skipped": False} for s in range(1, 9)
    ]  # fmt: skip
    source = {"loss": 0.5, "supervised_tokens": 9, "samples": 7}
    asked = source | {"questions": 4, "correct": 1, "accuracy": 25.0}
    asked["example"] = {"question": "a <b>?", "reference_answer": "yes", "generated_answer": ""}
    validations = [
        {"step": 4, "loss": 0.25, "accuracy": None, "sources": {"vsr": source}},
        {"step": 6, "loss": None, "accuracy": None, "sources": {"vsr": source | {"loss": None}}},
        {"step": 8, "loss": 0.5, "accuracy": 25.0, "sources": {"vsr": source, "gqa": asked}},
    ]
    pages = []
    for found in (validations, validations[1:2], []):
        write_report(tmp_path / "report.html", "AKI", [RunRecord("sft", metrics, "", found)])
        pages.append((tmp_path / "report.html").read_text())
    assert "0.2500 (step 4)" in pages[0] and "0.5000 (step 8)" in pages[0]
    assert "25.0 % of 4" in pages[0] and "a &lt;b&gt;?" in pages[0] and "(nothing)" in pages[0]
    assert "lowest validation loss" not in pages[1] and "validation after step 6" in pages[1]
    assert "validation" not in pages[2]
