"""The score of a benchmark with all that it depends on: rules, parser, judge, failures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PAPER_COLUMNS = (
    "MMEP", "MMEC", "MMB", "SEED", "LLaVA", "MMMU", "MathV", "POPE", "MM-Vet", "RWQA", "CV2D", "CV3D",
)  # fmt: skip
"""The columns of the papers' tables."""

NO_JUDGE = "none (exact matching)"
"""No language model was asked; what the rule does not decide is wrong."""


@dataclass(frozen=True)
class ScoreTable:
    """A table of a benchmark's details; a value of None has no question."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]


@dataclass(frozen=True)
class JudgeUse:
    """Who judged replies, and how often that failed."""

    name: str = NO_JUDGE
    is_heuristic: bool = False
    """An offline rule instead of a language model: never the papers' metric."""
    num_asked: int = 0
    num_failed: int = 0
    """Questions without a usable judgement."""


@dataclass(frozen=True)
class BenchmarkScore:
    """What one benchmark gives.

    columns   the papers' columns; a value of None could not be computed, see ``notes``
    others    further figures by name: splits and variants, and what is not the papers' metric

    Raises ValueError where a column of the papers comes from an offline heuristic, or where a name is no column.
    """

    benchmark: str
    columns: dict[str, float | None]
    others: dict[str, float | None] = field(default_factory=dict)
    tables: tuple[ScoreTable, ...] = ()
    rules: str = ""
    parser: str = ""
    judge: JudgeUse = JudgeUse()
    num_questions: int = 0
    num_undecided: int = 0
    """Replies that the parser reads nothing from."""
    num_errors: int = 0
    """Questions that could not be asked."""
    num_expected: int = 0
    """Questions of the benchmark's file; 0: not known."""
    profiles: tuple[str, ...] = ()
    source: str = ""
    """The benchmark's file and its MD5."""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.columns) - set(PAPER_COLUMNS):
            raise ValueError(f"{sorted(unknown)} are no columns of the papers")
        if self.judge.is_heuristic and self.columns:
            raise ValueError(f"{self.benchmark}: a heuristic judge cannot give the papers' {sorted(self.columns)}")

    @property
    def is_complete(self) -> bool:
        """Whether every question of the file was answered."""
        return not self.num_expected or self.num_questions == self.num_expected

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; nan and infinity become texts, which JSON has no numbers for."""
        return _finite(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BenchmarkScore":
        """Return the score that ``to_dict`` wrote. Raises TypeError or KeyError for other values."""
        values = _restored(values)
        tables = tuple(
            ScoreTable(table["title"], tuple(table["header"]), tuple(tuple(row) for row in table["rows"]))
            for table in values.pop("tables")
        )
        for name in ("profiles", "notes"):
            values[name] = tuple(values[name])
        return cls(**{**values, "tables": tables, "judge": JudgeUse(**values["judge"])})


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        return {key: _restored(item) for key, item in value.items()}
    return [_restored(item) for item in value] if isinstance(value, list) else value


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, None for no values."""
    return sum(values) / len(values) if values else None


def percent(values: Sequence[float]) -> float | None:
    """Return 100 times the mean, None for no values."""
    return 100 * sum(values) / len(values) if values else None
