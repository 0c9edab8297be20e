"""What a benchmark consists of, and how it is scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, ImageSource, Prediction
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore
from aki_megatron.evaluate.extraction.rules import Rules
from aki_megatron.evaluate.judges.judge import Judge
from aki_megatron.evaluate.judges.prompts import DEFAULT_PROMPTS, JudgePrompts

MMMU_PARSERS = ("kit", "official")

MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null")
)  # fmt: skip
"""Texts that pandas reads as missing: VLMEvalKit so drops an option or a hint of this text, and we do as well."""


@dataclass(frozen=True)
class Record:
    """A row of a benchmark's file.

    values  without the images, by column name
    where   file and row, for errors
    """

    values: Mapping[str, Any]
    images: tuple[ImageSource, ...]
    where: str

    def text(self, *names: str, default: str | None = None) -> str:
        """Return the first of these columns as a text, ``default`` without any. Raises DataError where both lack."""
        for name in names:
            if self.values.get(name) is not None:
                value = self.values[name]
                # an integer that a float column holds is written without the point
                return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        if default is None:
            raise DataError(f"{self.where} has no column {' or '.join(names)}; it has {sorted(self.values)}.")
        return default

    def choices(self) -> dict[str, str]:
        """Return the options in the columns A, B, ... that are not missing."""
        letters = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
        found = {letter: self.text(letter, default="") for letter in letters}
        return {letter: text for letter, text in found.items() if text not in MISSING}

    def hint(self) -> str:
        """Return the column ``hint``, "" where it is missing."""
        text = self.text("hint", default="")
        return "" if text in MISSING else text


@dataclass(frozen=True)
class ScoringOptions:
    """How predictions are scored."""

    rules: Rules = Rules.MAR2025
    mmmu_parser: str = "kit"
    judge: Judge | None = None
    judge_prompts: JudgePrompts = DEFAULT_PROMPTS
    judge_workers: int = 8
    """Requests to the judge at a time."""


@dataclass(frozen=True)
class TsvFile:
    """A table of VLMEvalKit; ``folder`` is where its server has it."""

    name: str
    md5: str
    folder: str = "VLMEval"

    @property
    def url(self) -> str:
        """Where to get it."""
        return f"https://opencompass.openxlab.space/utils/{self.folder}/{self.name}.tsv"


@dataclass(frozen=True)
class HubFiles:
    """Parquet files of a data set on the Hugging Face hub.

    repo    owner/name
    splits  what the files' names begin with
    config  a folder of the data set that holds them; "" for any
    """

    repo: str
    splits: tuple[str, ...]
    config: str = ""

    @property
    def url(self) -> str:
        """Where to get them."""
        return f"https://huggingface.co/datasets/{self.repo}"


def keep(questions: Sequence[BenchmarkQuestion], path: Path) -> Sequence[BenchmarkQuestion]:
    """Accept every table of the right columns."""
    del path
    return questions


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    columns        its columns in the papers' tables
    read_tsv       a record of a TSV -> a question; None for a record that is not of this benchmark
    read_parquet   the same of a parquet file
    finish         checks and completes all questions of a file; raises DataError for a wrong table
    lmms_task      its task name in lmms-eval
    num_hub_questions  questions of the public parquet files
    """

    name: str
    columns: tuple[str, ...]
    tsv_files: tuple[TsvFile, ...]
    hub_files: tuple[HubFiles, ...]
    read_tsv: Callable[[Record], BenchmarkQuestion | None]
    read_parquet: Callable[[Record], BenchmarkQuestion | None]
    score: Callable[[Sequence[Prediction], ScoringOptions], BenchmarkScore]
    lmms_task: str
    num_hub_questions: int
    wrong_md5s: Mapping[str, str] = field(default_factory=dict)
    """MD5 -> name of a similar table that is not this benchmark's."""
    finish: Callable[[Sequence[BenchmarkQuestion], Path], Sequence[BenchmarkQuestion]] = keep
