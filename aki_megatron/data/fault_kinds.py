"""Faults of a dataset by kind: messages that differ only in names, numbers and quoted text are of one kind."""

import re
from collections import Counter
from dataclasses import dataclass, field

_SUBSTITUTIONS = (
    (re.compile(r"^Tar .*?, key .*?: "), ""),
    (re.compile(r"^Sample \S+: "), ""),
    (re.compile(r"<[^<>]* at 0x[0-9a-f]+>"), "..."),
    (re.compile(r"(?<!field )(?<!\w)'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""), "..."),
    (re.compile(r"\[[^\[\]]*\]"), "[...]"),
    (re.compile(r"\S*/\S+"), "..."),
    (re.compile(r"[-+]?\d[\d.,]*(?<![.,])(?:e[-+]?\d+)?"), "N"),
)
_MAX_KIND = 160


def fault_kind(reason: str) -> str:
    """Return what the messages of one kind have in common."""
    kind = reason
    for pattern, replacement in _SUBSTITUTIONS:
        kind = pattern.sub(replacement, kind)
    return kind if len(kind) <= _MAX_KIND else f"{kind[:_MAX_KIND]}..."


@dataclass
class FaultCounts:
    """Faults by kind, and the message of the first of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, location: str, reason: str) -> None:
        """Count one fault, ``reason`` at ``location`` (a file and an entry)."""
        self.record(fault_kind(reason), f"{location}: {reason}" if location else reason)

    def record(self, kind: str, message: str, number: int = 1) -> None:
        """Count a number of faults of a kind."""
        self.counts[kind] += number
        if kind not in self.first:
            # lone surrogates, which foreign text may hold, cannot be printed
            self.first[kind] = message.encode("utf-8", "backslashreplace").decode()

    def update(self, other: "FaultCounts") -> None:
        """Add the faults of another part, which comes later."""
        self.counts.update(other.counts)
        self.first = {**other.first, **self.first}

    @property
    def total(self) -> int:
        """Number of faults of all kinds."""
        return self.counts.total()

    def lines(self, max_kinds: int = 5) -> list[str]:
        """Return a line for each of the most frequent kinds: how often, and the first."""
        kinds = self.counts.most_common(max_kinds)
        rest = self.total - sum(count for _, count in kinds)
        lines = [f"{count:,} x {self.first[kind]}" for kind, count in kinds]
        return lines + ([f"{rest:,} of {len(self.counts) - len(kinds)} other kinds"] if rest else [])
