"""Made-up files in the public formats of the benchmarks: VLMEvalKit's TSV and the hub's parquet."""

import base64
import csv
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(color: str = "red", size: int = 24) -> bytes:
    """An image whose base64 is longer than a reference to another row."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(color: str = "red") -> str:
    return base64.b64encode(png(color)).decode()


CHOICES = {"A": "cat", "B": "dog", "C": "fox", "D": ""}

TABLES: dict[str, list[dict[str, Any]]] = {
    "MME": [
        {"index": 1, "image": encoded(), "question": "Is it red? Please answer yes or no.", "answer": "Yes",
         "category": "color", "image_path": "a.png"},
        {"index": 2, "image": "1", "question": "Is it blue? Please answer yes or no.", "answer": "No",
         "category": "color", "image_path": "a.png"},
    ],
    "MMBench_DEV_EN": [
        {"index": 7, "question": "Which\tis it?", "hint": "look\nup", **CHOICES, "answer": "A", "category": "naming",
         "image": encoded(), "l2-category": "coarse_perception", "split": "dev"},
        {"index": 1000007, "question": "Which\tis it?", "hint": "", "A": "dog", "B": "cat", "C": "None", "D": "",
         "answer": "B", "category": "naming", "image": "7", "l2-category": "coarse_perception", "split": "dev"},
    ],
    "SEEDBench_IMG": [
        {"index": 5, "image": encoded(), "question": "What?", **CHOICES, "answer": "B", "category": "Visual Reasoning"},
    ],
    "LLaVABench": [
        {"index": 0, "image": encoded(), "question": "Describe it.", "category": "detail", "caption": "A red square.",
         "gpt4_ans": "It is a red square."},
    ],
    "MMMU_DEV_VAL": [
        {"index": 1, "image": str([encoded("red"), encoded("blue")]), "question": "See <image 2> and <image 1>.",
         **CHOICES, "answer": "C", "category": "Art", "l2-category": "Art & Design", "split": "validation"},
        {"index": 2, "image": encoded(), "question": "How many?", "A": "", "B": "", "C": "", "D": "", "answer": "25",
         "category": "Math", "l2-category": "Science", "split": "dev"},
    ],
    "MathVista_MINI": [
        {"index": 3, "image": encoded(), "question": "Hint: a number.\nQuestion: How many?", "answer": "4",
         "question_type": "free_form", "answer_type": "integer", "choices": "", "answer_option": "",
         "task": "math word problem", "skills": "['arithmetic reasoning']"},
        {"index": 4, "image": encoded(), "question": "Hint: a letter.\nQuestion: Which?", "answer": "dog",
         "question_type": "multi_choice", "answer_type": "text", "choices": "['cat', 'dog']", "answer_option": "B",
         "task": "figure question answering", "skills": "['logical reasoning', 'arithmetic reasoning']"},
    ],
    "POPE": [
        {"index": 0, "image": encoded(), "question": "Is there a cat?", "answer": "Yes", "category": "random,popular"},
    ],
    "MMVet": [
        {"index": 0, "image": encoded(), "question": "What is x?", "answer": "2<AND>7", "category": "ocr,math"},
    ],
    "RealWorldQA": [
        {"index": 0, "image": encoded(), "question": "Where to?", **CHOICES, "answer": "C"},
    ],
    "CV-Bench-2D": [
        {"index": 0, "image": encoded(), "question": "How many cats?", **CHOICES, "answer": "A", "task": "Count",
         "source": "COCO", "split": "2D", "prompt": "How many cats? (A) cat (B) dog (C) fox"},
    ],
    "CV-Bench-3D": [
        {"index": 0, "image": encoded(), "question": "Which is nearer?", **CHOICES, "answer": "(B)", "task": "Depth",
         "source": "Omni3D", "split": "3D", "prompt": "Which is nearer?"},
    ],
}  # fmt: skip
"""Name of VLMEvalKit's table -> rows."""

NUM_QUESTIONS = {
    "MME": 2, "MMBench": 2, "SEED-Bench": 1, "LLaVA-Bench": 1, "MMMU": 2, "MathVista": 2, "POPE": 1, "MM-Vet": 1,
    "RealWorldQA": 1, "CV-Bench": 2,
}  # fmt: skip


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    header = list(rows[0])
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([header, *([row.get(name, "") for name in header] for row in rows)])


def write_tables(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in TABLES.items():
        write_tsv(folder / f"{name}.tsv", rows)
    return folder


IMAGE = {"bytes": png(), "path": "a.png"}
HUB_FILES: dict[str, list[dict[str, Any]]] = {
    "lmms-lab/MME/data/test-00000-of-00001.parquet": [
        {"question_id": "color/1.png", "image": IMAGE, "question": f"Is it {color}? Please answer yes or no.",
         "answer": answer, "category": "color"} for color, answer in (("red", "Yes"), ("blue", "No"))
    ],
    "lmms-lab/MMBench/en/dev-00000-of-00001.parquet": [
        {"index": index, "question": "Which is it?", "hint": "nan", "answer": answer, "A": "cat", "B": "dog",
         "C": "nan", "D": "nan", "category": "naming", "image": IMAGE, "L2-category": "coarse_perception",
         "split": "dev"} for index, answer in ((7, "A"), (1000007, "B"))
    ],
    "lmms-lab/SEED-Bench/data/test-00000-of-00001.parquet": [
        {"question": "What?", "choice_a": "cat", "choice_b": "dog", "choice_c": "fox", "choice_d": "cow",
         "answer": "B", "data_type": kind, "question_type_id": 8, "question_id": f"{kind}1", "image": [IMAGE]}
        for kind in ("image", "video")
    ],
    "lmms-lab/llava-bench-in-the-wild/data/train-00000-of-00001.parquet": [
        {"question_id": 0, "image": IMAGE, "question": "Describe it.", "caption": "A red square.",
         "gpt_answer": "It is a red square.", "category": "llava_bench_detail"},
    ],
    "MMMU/MMMU/Art/validation-00000-of-00001.parquet": [
        {"id": "validation_Art_1", "question": "See <image 2>.", "options": "['cat', 'dog']", "answer": "B",
         "question_type": "multiple-choice", "subfield": "x", "image_1": IMAGE, "image_2": IMAGE},
    ],
    "MMMU/MMMU/Math/dev-00000-of-00001.parquet": [
        {"id": "dev_Math_1", "question": "How many?", "options": "[]", "answer": "['25', 'twenty']",
         "question_type": "open", "subfield": "x", "image_1": IMAGE, "image_2": None},
    ],
    "AI4Math/MathVista/data/testmini-00000-of-00001.parquet": [
        {"pid": str(3 + number), "question": "How many?", "image": "images/1.jpg", "decoded_image": IMAGE,
         "choices": choices, "unit": None, "precision": 1.0, "answer": answer, "question_type": kind,
         "answer_type": "integer" if kind == "free_form" else "text", "query": "Hint: x\nQuestion: How many?",
         "metadata": {"task": "math word problem", "skills": ["arithmetic reasoning"]}}
        for number, (kind, answer, choices) in enumerate(
            (("free_form", "4", None), ("multi_choice", "dog", ["cat", "dog"]))
        )
    ],
    "lmms-lab/POPE/data/test-00000-of-00001.parquet": [
        {"id": "1", "question_id": "1", "question": "Is there a cat?", "answer": "yes", "image_source": "x",
         "image": IMAGE, "category": "random"},
    ],
    "lmms-lab/MMVet/data/test-00000-of-00001.parquet": [
        {"question_id": "v1_0", "image": IMAGE, "question": "What is x?", "answer": "2<AND>7", "image_source": "x",
         "capability": "ocr,math"},
    ],
    "lmms-lab/RealWorldQA/data/test-00000-of-00001.parquet": [
        {"image": IMAGE, "answer": "C", "question": "Where to?\n\nA. cat\nB. dog\nC. fox\n"
         "Please answer directly with only the letter of the correct option and nothing else."},
    ],
    "nyu-visionx/CV-Bench/test.parquet": [
        {"idx": 0, "type": kind, "task": "Count", "image": IMAGE, "question": "How many?", "choices": ["1", "2"],
         "answer": "(B)", "prompt": "How many? (A) 1 (B) 2", "filename": "x", "source": source}
        for kind, source in (("2D", "ADE20K"), ("3D", "Omni3D"))
    ],
}  # fmt: skip
"""Path below a root -> rows."""


def write_parquet(root: Path) -> Path:
    for name, rows in HUB_FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    return root
