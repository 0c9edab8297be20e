"""Report of scores on the papers' twelve columns beside their published rows: Markdown, HTML, JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from aki_megatron.evaluate.benchmarks.score import PAPER_COLUMNS, BenchmarkScore, ScoreTable
from aki_megatron.evaluate.published import DOUBTS, PUBLISHED

EMPTY = "-"
INCOMPLETE, DOUBTFUL = "*", "?"

Scores = Mapping[str, Sequence[BenchmarkScore]]
"""Name of a model -> its scores."""

LEGEND = (
    f"{INCOMPLETE} not of all questions, or some could not be asked. {DOUBTFUL} contradicted by the paper's own "
    f"details, see below. {EMPTY} no score. MMMU is the validation split; dev is printed apart."
)


def format_value(value: str | float | int | None) -> str:
    """Return a cell: one decimal for a float."""
    if value is None:
        return EMPTY
    if isinstance(value, float):
        return f"{value:.1f}" if math.isfinite(value) else str(value)
    return str(value)


def main_table(scores: Scores) -> ScoreTable:
    """Return the twelve columns: our rows, then the published ones."""
    rows: list[tuple[str, ...]] = []
    for model, found in scores.items():
        cells = dict.fromkeys(PAPER_COLUMNS, EMPTY)
        for score in found:
            mark = "" if score.is_complete and not score.num_errors else INCOMPLETE
            for column, value in score.columns.items():
                cells[column] = format_value(value) + (mark if value is not None else "")
        rows.append((model, *cells.values()))
    for row in PUBLISHED:
        values = row.columns.items()
        cells_of = (
            format_value(value) + (DOUBTFUL if (row.name, column) in DOUBTS else "") for column, value in values
        )
        rows.append((f"{row.name}, published", *cells_of))
    return ScoreTable("Twelve columns", ("model", *PAPER_COLUMNS), tuple(rows))


def short_table(scores: Scores) -> ScoreTable:
    """Return the twelve columns as rows, for a terminal: our models, and AKI-4B of both versions of the paper."""
    table = main_table(scores)
    shown = table.rows[: len(scores) + 2]
    rows = tuple((column, *(row[place] for row in shown)) for place, column in enumerate(table.header[1:], start=1))
    return ScoreTable(table.title, ("column", *(str(row[0]) for row in shown)), rows)


def conditions_table(scores: Sequence[BenchmarkScore]) -> ScoreTable:
    """Return what each score depends on: rules, parser, judge and its failures, prompt, file."""
    header = (
        "score", "value", "questions", "rules", "parser", "undecided", "judge", "judge failures", "prompts", "file",
    )  # fmt: skip
    rows = []
    for score in scores:
        judge = score.judge
        questions = f"{score.num_questions} of {score.num_expected}" if score.num_expected else score.num_questions
        conditions = (
            questions,
            score.rules,
            score.parser,
            score.num_undecided,
            judge.name,
            f"{judge.num_failed} of {judge.num_asked}" if judge.num_asked else EMPTY,
            ", ".join(score.profiles) or EMPTY,
            score.source or EMPTY,
        )
        rows += [(name, value, *conditions) for name, value in score.columns.items()]
        rows += [(f"{name} (not a column of the papers)", value, *conditions) for name, value in score.others.items()]
    return ScoreTable("What each score depends on", header, tuple(rows))


def doubts() -> list[str]:
    """Return the sentences about published numbers that are in doubt."""
    return [f"{row}, {column}: {reason}." for (row, column), reason in DOUBTS.items()]


def write_reports(folder: Path, scores: Scores) -> list[Path]:
    """Write report.md, report.html and report.json; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"report.md": to_markdown(scores), "report.html": to_html(scores), "report.json": to_json(scores)}
    paths = []
    for name, text in texts.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def to_json(scores: Scores) -> str:
    """Return all scores and the published rows."""
    document = {
        "columns": PAPER_COLUMNS,
        "models": {model: [score.to_dict() for score in found] for model, found in scores.items()},
        "published": [asdict(row) for row in PUBLISHED],
        "doubts": [{"row": row, "column": column, "reason": reason} for (row, column), reason in DOUBTS.items()],
    }
    return json.dumps(document, indent=1) + "\n"


def to_markdown(scores: Scores) -> str:
    """Return the report as Markdown."""
    blocks = ["# Scores on the papers' twelve columns", markdown_table(main_table(scores)), LEGEND]
    for model, found in scores.items():
        conditions = conditions_table(found)
        blocks += [f"## {_plain(model)}", f"### {conditions.title}", markdown_table(conditions)]
        blocks += [f"- {_plain(f'{score.benchmark}: {note}')}" for score in found for note in score.notes]
        for table in (table for score in found for table in score.tables):
            blocks += [f"### {table.title}", markdown_table(table)]
    blocks += ["## Published numbers in doubt", "\n".join(f"- {_plain(line)}" for line in doubts())]
    return "\n\n".join(blocks) + "\n"


def markdown_table(table: ScoreTable) -> str:
    """Return a table; texts of data sets are made harmless."""
    lines = [table.header, ("---",) * len(table.header), *table.rows]
    cells = [[_plain(format_value(cell)) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _plain(text: str) -> str:
    """Return a text on one line without Markdown's and HTML's signs."""
    one_line = " ".join(text.split())
    return one_line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")


def to_html(scores: Scores) -> str:
    """Return the report as one page."""
    environment = Environment(loader=PackageLoader("aki_megatron.evaluate", "."), autoescape=True)
    environment.filters["cell"] = format_value
    models: list[dict[str, Any]] = [
        {
            "name": model,
            "conditions": conditions_table(found),
            "notes": [f"{score.benchmark}: {note}" for score in found for note in score.notes],
            "tables": [table for score in found for table in score.tables],
        }
        for model, found in scores.items()
    ]
    return environment.get_template("benchmark_report.html.j2").render(
        main=main_table(scores), num_ours=len(scores), models=models, legend=LEGEND, doubts=doubts()
    )
