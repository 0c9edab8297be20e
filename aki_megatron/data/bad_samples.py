"""Bad samples: what was wrong with them, how many there were, and when a run must stop."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aki_megatron.errors import DataError, UserError

ALWAYS_TOLERATED = 8
"""Bad samples that never stop a run whose budget is not 0: a fraction is noisy early on."""

_MAX_LISTED = 5


_PANIC = "PanicException"
"""What the Rust code of tokenizers raises at a bug of its own; it derives from BaseException."""


@contextmanager
def sample_errors(location: str | Callable[[], str]) -> Iterator[None]:
    """Turn whatever reading, tokenizing or decoding one sample raises into a DataError that says where it was.

    A sample never ends a run: decoders raise AssertionError, MemoryError and others at malformed input. UserErrors have
    their message already, and interrupts are no errors of a sample: both pass.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        where = location if isinstance(location, str) else location()
        raise DataError(f"{where}: {type(error).__name__}: {str(error) or 'no message'}") from error


def num_tolerated(max_bad_fraction: float, num_requested: int) -> float:
    """Return how many bad ones of ``num_requested`` are tolerated; none where the fraction is 0."""
    return max(ALWAYS_TOLERATED, max_bad_fraction * num_requested) if max_bad_fraction else 0


class BadSampleBudgetExceeded(DataError):  # noqa: N818 (the field's name for it)
    """More samples were unreadable or empty than the budget allows; the message names the first ones."""


@dataclass(frozen=True)
class BadSample:
    """An item of a source that cannot be used; ``reason`` names its file and key."""

    source: str
    reason: str

    def __post_init__(self) -> None:
        # an id may hold half a surrogate pair, which no console and no log can write
        object.__setattr__(self, "reason", self.reason.encode("utf-8", "backslashreplace").decode())


@dataclass
class BadSampleBudget:
    """Count the bad samples that this rank has met since it started, by source.

    ``record`` raises BadSampleBudgetExceeded as soon as more than max(8, max_bad_fraction x samples asked for) were
    bad, of which the bad ones are a part; with max_bad_fraction = 0 at the first. An item that is met again counts
    again. Every rank counts what it reads itself.

    num_good  samples that were trained on
    """

    max_bad_fraction: float
    num_good: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first_reasons: list[str] = field(default_factory=list)
    latest_reason: str = ""

    def summary(self) -> str:
        """Return how many samples were bad, by source, and the latest reason; empty while there is none."""
        if not self.latest_reason:
            return ""
        return f"{self._totals()}; the latest: {self.latest_reason}"

    @property
    def num_requested(self) -> int:
        """Samples that were asked for, good and bad: every bad one is replaced by another."""
        return self.num_good + self.counts.total()

    def record(self, num_good: int, bad_samples: Iterable[BadSample]) -> None:
        """Count samples to train on and the bad samples met on the way.

        Raises BadSampleBudgetExceeded when the budget is spent.
        """
        self.num_good += num_good
        for bad in bad_samples:
            self.counts[bad.source] += 1
            self.latest_reason = bad.reason
            if len(self.first_reasons) < _MAX_LISTED and bad.reason not in self.first_reasons:
                self.first_reasons.append(bad.reason)
        if self.counts.total() > num_tolerated(self.max_bad_fraction, self.num_requested):
            listing = "\n  ".join(self.first_reasons)
            raise BadSampleBudgetExceeded(
                f"{self._totals()}, more than data.max_bad_fraction={self.max_bad_fraction} allows. Repair or remove "
                f"them, or raise it. The first:\n  {listing}"
            )

    def _totals(self) -> str:
        by_source = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        return f"{self.counts.total()} bad samples in {self.num_requested} requested ({by_source})"
