"""Write what was measured: attention.json, attention.md and attention.png."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from aki_megatron.evaluate.attention_analysis.categories import INSTRUCTION, Categories
from aki_megatron.evaluate.attention_analysis.figures import draw_categories
from aki_megatron.evaluate.attention_analysis.statistics import AttentionStatistics, merged
from aki_megatron.evaluate.benchmark_report import markdown_table
from aki_megatron.evaluate.benchmarks.score import ScoreTable

ALL = "all samples"

DEFINITION = (
    "Attention from image tokens to the words of the question that come later in the same turn: summed over the tokens "
    "of a category, mean over image tokens, heads, layers and samples. Per token: divided by the sample's tokens of "
    "the category, over the samples that have it. Share of text: of all categories together. Words of constant "
    f"instructions are in no category; their sum is the column {INSTRUCTION}."
)


@dataclass(frozen=True)
class Conditions:
    """What the numbers depend on.

    notes  for example why a preferred tagger did not run
    """

    model: str
    rule: str
    layers: tuple[int, ...]
    tagger: str
    categories_file: str
    profile: str
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def write_report(
    out: Path, found: Sequence[AttentionStatistics], categories: Categories, conditions: Conditions
) -> list[Path]:
    """Write the three files into a folder; return their paths."""
    everything = [*found, merged(found, ALL)] if len(found) > 1 else list(found)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "attention.json": json.dumps(to_dict(everything, categories, conditions), indent=1) + "\n",
        "attention.md": to_markdown(everything, conditions),
    }
    paths = [out / name for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    chart = out / "attention.png"
    chart.write_bytes(draw_categories([everything[-1], *everything[:-1]] if len(found) > 1 else everything))
    return [*paths, chart]


def to_dict(found: Sequence[AttentionStatistics], categories: Categories, conditions: Conditions) -> dict[str, Any]:
    """Return the document of attention.json."""
    return {
        "definition": DEFINITION,
        "conditions": {**conditions.__dict__, "layers": list(conditions.layers)},
        "categories": {
            "names": list(categories.names),
            "tags": dict(categories.of_tags),
            "words": dict(categories.of_words),
            "rest": categories.rest,
            "instructions": list(categories.instructions),
        },
        "results": [each.to_dict() for each in found],
    }


def to_markdown(found: Sequence[AttentionStatistics], conditions: Conditions) -> str:
    """Return attention.md."""
    lines = [
        f"- model: {conditions.model}, rule {conditions.rule}, layers {layers_text(conditions.layers)}",
        f"- tagger: {conditions.tagger}; categories: {conditions.categories_file}; prompts: {conditions.profile}",
        *(f"- {line}" for line in (*conditions.sources, *conditions.notes)),
    ]
    last = found[-1]
    blocks = ["# Attention from image tokens to words", DEFINITION, "\n".join(lines)]
    blocks += [f"## {table.title}\n\n{markdown_table(table)}" for table in tables(found)]
    blocks.append(f"## Summed attention by layer, {last.name}\n\n{markdown_table(_layer_table(last))}")
    for each in found:
        if each.name != ALL and each.reasons:
            reasons = "\n".join(f"- {' '.join(reason.split())}" for reason in each.reasons)
            blocks.append(f"## Left out of {each.name}: {each.num_errors}\n\nThe first:\n\n{reasons}")
    return "\n\n".join(blocks) + "\n"


def tables(found: Sequence[AttentionStatistics]) -> list[ScoreTable]:
    """Return the three statistics and the counts, a line for each benchmark."""
    rows = found[0].rows
    return [
        _table("Summed attention", rows, found, lambda each: each.mass.mean(dim=0)),
        _table("Attention per token", rows, found, lambda each: each.per_token.mean(dim=0)),
        _table("Share of text", rows[:-1], found, lambda each: each.share.nanmean(dim=0)),
        ScoreTable(
            "Words",
            ("questions", "used", "left out", *rows),
            tuple((each.name, each.num_samples, each.num_errors, *each.to_dict()["words"].values()) for each in found),
        ),
    ]


def summary_table(found: Sequence[AttentionStatistics]) -> ScoreTable:
    """Return the statistics with a line for each benchmark and category, for a terminal."""
    lines: list[tuple[str | int | None, ...]] = []
    for each in found:
        words = each.to_dict()["words"]
        columns = (each.mass.mean(dim=0), each.per_token.mean(dim=0), each.share.nanmean(dim=0))
        shown = [_cells(values) for values in columns]
        shown[2].append(None)  # constant instructions are no part of the text
        for number, row in enumerate(each.rows):
            name = f"{each.name} ({each.num_samples})" if number == 0 else ""
            lines.append((name, row, words[row], *(cells[number] for cells in shown)))
    header = ("questions", "words", "number", "summed attention", "per token", "share of text")
    return ScoreTable("Attention from image tokens to words", header, tuple(lines))


def _table(title: str, columns: Sequence[str], found: Sequence[AttentionStatistics], values: Any) -> ScoreTable:
    lines = tuple((each.name, each.num_samples, *_cells(values(each))) for each in found)
    return ScoreTable(title, ("questions", "used", *columns), lines)


def _layer_table(each: AttentionStatistics) -> ScoreTable:
    lines = tuple((str(layer), *_cells(mass)) for layer, mass in zip(each.layers, each.mass, strict=True))
    return ScoreTable("", ("layer", *each.rows), lines)


def _cells(values: Tensor) -> list[str | None]:
    return [None if value != value else f"{value:.4f}" for value in values.tolist()]


def layers_text(layers: Sequence[int]) -> str:
    """Return the numbers, a range as ``0-31``."""
    is_range = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if is_range else ", ".join(map(str, layers))
