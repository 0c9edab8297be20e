"""Write predictions as the files that VLMEvalKit and lmms-eval write, for their own scoring and tools.

vlmevalkit  DIR/<model>/T<date>-<time>/<model>_<dataset>.xlsx (or .tsv, .json) and status.json
lmms-eval   DIR/<model>/<datetime>_samples_<task>.jsonl
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.registry import BENCHMARKS

FORMATS = ("xlsx", "tsv", "json")
"""Of VLMEvalKit's tables (its PRED_FORMAT)."""

MAX_XLSX_CELL = 32767
"""Characters that a cell of a spreadsheet holds."""

_NOT_IN_XLSX = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_NOT_IN_NAMES = re.compile(r'[\s"<>:/|\\?*\[\]]+')
_NEED_OPENPYXL = "Writing xlsx needs openpyxl: pip install openpyxl (or: pip install 'aki-megatron[eval]'), or use tsv."

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Exported:
    """Files written, and what was changed to fit their format."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def safe_name(model: str) -> str:
    """Return a model's name as part of a path, as lmms-eval makes it."""
    return _NOT_IN_NAMES.sub("__", model).strip(".") or "model"


def export_vlmevalkit(
    predictions: Mapping[str, Sequence[Prediction]], out: Path, *, model: str, now: datetime, file_format: str = "xlsx"
) -> Exported:
    """Write one table for each of the kit's data sets, and status.json."""
    name = safe_name(model)
    folder = out / name / f"T{now:%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    notes: list[str] = []
    statuses: dict[str, dict[str, str]] = {}
    for dataset, found in _by_dataset(predictions).items():
        path = folder / f"{name}_{dataset}.{file_format}"
        num_cut = _write_table(path, [_kit_row(prediction) for prediction in found])
        if num_cut:
            notes.append(f"{path.name}: {num_cut} cells were cut to {MAX_XLSX_CELL} characters; tsv keeps them whole.")
        if any(not _kit_index(prediction.question).isdigit() for prediction in found):
            notes.append(f"{path.name}: indices are not VLMEvalKit's; its scorer needs predictions made from its TSV.")
        paths.append(path)
        statuses[dataset] = {"prediction_file": path.name, "status": "infer"}
    status = {
        "eval_id": folder.name,
        "model_name": name,
        "created_at": now.astimezone().isoformat(),
        "updated_at": now.astimezone().isoformat(),
        "commit": "",
        "argv": [],
        "mode": "infer",
        "pred_format": file_format,
        "eval_format": "csv",
        "datasets": {
            path.stem.removeprefix(f"{name}_"): {"prediction_file": path.name, "status": "infer"} for path in paths
        },
    }
    (folder / "status.json").write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
    return Exported((*paths, folder / "status.json"), tuple(notes))


def _by_dataset(predictions: Mapping[str, Sequence[Prediction]]) -> dict[str, list[Prediction]]:
    """Return the predictions by VLMEvalKit's data set; CV-Bench has two."""
    found: dict[str, list[Prediction]] = {}
    for name, group in predictions.items():
        for prediction in group:
            dataset = (
                f"CV-Bench-{prediction.question.split}" if name == "CV-Bench" else BENCHMARKS[name].tsv_files[0].name
            )
            found.setdefault(dataset, []).append(prediction)
    return found


def _kit_index(question: BenchmarkQuestion) -> str:
    return question.id.removeprefix(f"{question.split}-") if question.benchmark == "CV-Bench" else question.id


def _kit_row(prediction: Prediction) -> dict[str, str]:
    """Return the kit's columns of a prediction; empty ones are left out."""
    question, details = prediction.question, prediction.question.details
    row = {"index": _kit_index(question), "question": question.text, "hint": question.hint}
    if question.benchmark == "MathVista":
        row |= {"choices": repr(list(question.choices.values())), "skills": repr(details["skills"])}
        row |= {name: str(details[name]) for name in ("question_type", "answer_type", "answer_option")}
        row |= {"task": question.category}
    else:
        row |= dict(question.choices) | {"category": question.category, "l2-category": question.l2_category}
    row |= {"answer": question.answer, "split": question.split}
    if question.benchmark == "MME":
        row["image_path"] = question.group
    elif question.benchmark == "LLaVA-Bench":
        row |= {"caption": str(details.get("caption", "")), "gpt4_ans": question.answer}
    elif question.benchmark == "CV-Bench":
        row |= {"source": str(details.get("source", "")), "task": question.category}
    return {name: value for name, value in row.items() if value} | {"prediction": prediction.reply}


def _write_table(path: Path, rows: Rows) -> int:
    """Write a table by the ending of its name; return how many cells were cut."""
    header = list(dict.fromkeys(name for row in rows for name in row if name != "prediction")) + ["prediction"]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
        return 0
    cells = [[row.get(name, "") for name in header] for row in rows]
    if path.suffix == ".tsv":
        buffer = io.StringIO()
        csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows([header, *cells])
        path.write_text(buffer.getvalue(), encoding="utf-8")
        return 0
    return _write_xlsx(path, [header, *cells])


def _write_xlsx(path: Path, lines: Sequence[Sequence[str]]) -> int:
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
    except ImportError as error:
        raise DataError(_NEED_OPENPYXL) from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    num_cut = 0
    for line in lines:
        cells = []
        for text in line:
            num_cut += len(text) > MAX_XLSX_CELL
            cell = WriteOnlyCell(sheet, value=_NOT_IN_XLSX.sub("", text)[:MAX_XLSX_CELL])
            cell.data_type = "s"  # a reply that begins with "=" is a text, not a formula
            cells.append(cell)
        sheet.append(cells)
    book.save(path)
    return num_cut


def export_lmms_eval(
    predictions: Mapping[str, Sequence[Prediction]], out: Path, *, model: str, now: datetime
) -> Exported:
    """Write the samples of each task; doc_id counts the questions, doc_hash is of the question without its images."""
    folder = out / safe_name(model)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for task, found in _by_task(predictions).items():
        path = folder / f"{now:%Y%m%d_%H%M%S}_samples_{task}.jsonl"
        lines = [json.dumps(_sample(number, prediction), ensure_ascii=False) for number, prediction in enumerate(found)]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        paths.append(path)
    return Exported(tuple(paths))


def _by_task(predictions: Mapping[str, Sequence[Prediction]]) -> dict[str, list[Prediction]]:
    found: dict[str, list[Prediction]] = {}
    for name, group in predictions.items():
        for prediction in group:
            is_dev = name == "MMMU" and prediction.question.split == "dev"
            found.setdefault("mmmu_dev" if is_dev else BENCHMARKS[name].lmms_task, []).append(prediction)
    return found


def _sample(number: int, prediction: Prediction) -> dict[str, Any]:
    """Return lmms-eval's record of one question; equal resps and filtered_resps are written once, as it does."""
    document = json.dumps(prediction.to_dict()["question"], indent=2, ensure_ascii=False)
    return {
        "doc_id": number,
        "input": prediction.question.text,
        "target": prediction.question.answer,
        "filtered_resps": [prediction.reply],
        "doc_hash": hashlib.sha256(document.encode()).hexdigest(),
        "question_id": prediction.question.id,
    }
