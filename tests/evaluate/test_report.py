"""Scores and the page they are shown on."""

import re
from pathlib import Path

import torch

from aki_megatron.evaluate.mask_picture import MaskPanel, draw_masks
from aki_megatron.evaluate.run_report import RunRecord, write_report
from aki_megatron.evaluate.scores import Answer, score
from aki_megatron.types import Modality

PNG = b"\x89PNG"


def answers() -> list[Answer]:
    golds = ["red", "red", "red", "blue"]
    given = ["red", " Red ", "blue", "blue"]
    return [Answer(f"t/{i}", "color", f"q{i}", g, a, None) for i, (g, a) in enumerate(zip(golds, given, strict=True))]


def test_accuracy_and_majority_are_counted_by_task() -> None:
    more = [*answers(), Answer("u/0", "count", "how many <b>?", "2", "3", None)]
    color, count = score(more)
    assert (color.task, color.questions, color.accuracy, color.majority, color.majority_answer) == (
        "color", 4, 75.0, 75.0, "red",
    )  # fmt: skip
    assert (count.accuracy, count.majority) == (0.0, 100.0)
    assert 42 < color.half_width < 43


def test_the_report_shows_curves_scores_pictures_and_the_mask(tmp_path: Path) -> None:
    picture = tmp_path / "scene.png"
    picture.write_bytes(PNG)
    shown = [*answers(), Answer("u/0", "count", "how many <b>?", "2", "3", str(picture))]
    metrics = [
        {"step": s, "loss": 1 / s, "grad_norm": 1.0, "lr": 0.1, "supervised_tokens": 3, "tokens": 10, "images": 1,
         "seconds": 0.5, "skipped": False} for s in range(1, 9)
    ]  # fmt: skip
    modality_ids = [Modality.TEXT, Modality.IMAGE, Modality.TEXT, Modality.RESPONSE]
    mask = draw_masks([MaskPanel("causal", torch.ones(4, 4).tril().bool())], modality_ids, ["a", "$", "c", "d"])
    assert mask.startswith(PNG)
    out = tmp_path / "report.html"
    runs = [RunRecord("sft", metrics, "run:\n  dir: x\n"), RunRecord("later", [], "")]
    write_report(out, "AKI", runs, scores=score(shown), answers=shown, mask=(mask, "who sees whom"))
    page = out.read_text()
    assert "75.0" in page and "majority" in page and "who sees whom" in page
    assert "how many &lt;b&gt;?" in page  # text of a dataset is never markup
    assert re.search(r"tokens per second</td><td class=\"number\">20<", page)
    assert "No optimizer step has been recorded yet" in page
    assert page.count("data:image/png;base64,") == 3
