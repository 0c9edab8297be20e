"""Bad samples: what was wrong, how many were met, and when a run must stop."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from aki_megatron.errors import DataError

TOLERATED = 8
"""Bad samples that never stop a run whose budget is not 0: a share means nothing over the first few hundred."""

_NAMED = 5


class BadSampleBudgetExceeded(DataError):  # noqa: N818 (the name the rules of the house use)
    """More samples were unreadable or empty than the budget allows; the message names the first ones."""


@dataclass(frozen=True)
class BadSample:
    """One element of a source that cannot be used; ``reason`` names its file and key."""

    source: str
    reason: str


@dataclass
class BadSampleBudget:
    """Bad elements met by this rank since it started, counted by source.

    The run stops (BadSampleBudgetExceeded) as soon as more than max(8, max_bad_fraction x samples asked for) were bad; with
    max_bad_fraction = 0 at the first. An element that is met again counts again: the budget is a share of
    what is trained on. Every rank counts what it reads itself.
    """

    max_bad_fraction: float
    asked: int = 0
    by_source: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    latest: str = ""

    def describe(self) -> str:
        """How many bad elements were met, by source, and the latest; empty while there is none."""
        if not self.latest:
            return ""
        bad = self.by_source.total()
        return f"{bad} bad elements in {self.asked} samples ({self._shares()}); the latest: {self.latest}"

    def add(self, asked: int, faults: Iterable[BadSample]) -> None:
        """Count samples asked for and the bad elements met on the way; BadSampleBudgetExceeded when the budget is spent."""
        self.asked += asked
        for fault in faults:
            self.by_source[fault.source] += 1
            self.latest = fault.reason
            if len(self.first) < _NAMED:
                self.first.append(fault.reason)
        bad = self.by_source.total()
        allowed = max(TOLERATED, self.max_bad_fraction * self.asked) if self.max_bad_fraction else 0
        if bad > allowed:
            listing = "\n  ".join(self.first)
            raise BadSampleBudgetExceeded(
                f"{bad} bad elements in {self.asked} samples ({self._shares()}), more than data.max_bad_fraction="
                f"{self.max_bad_fraction} allows. Mend or remove them, or raise it. The first:\n  {listing}"
            )

    def _shares(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.by_source.items()))
