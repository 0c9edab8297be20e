"""What a conversion did to every tensor: strict by default, exceptions only by name, written down and shown."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.tensors import NameTable, Shape, TensorFact
from aki_megatron.errors import CheckpointError

REPORT = "conversion.json"

KINDS = {
    "mapped": "one tensor became one of the same shape",
    "put together": "several tensors became one, along axis 0",
    "cut": "one tensor became several, along axis 0",
    "grown": "the tensor came with fewer rows; the others are new",
    "drawn": "no such source has this tensor; new, as in a run that starts with random weights",
    "missing": "not in the source, allowed by name; new",
    "shape-changed": "of another shape in the source, allowed by name; new",
    "extra": "in the source only, allowed by name; left out",
    "left out": "in the source only, and not used by any AKI model",
}
"""What may happen to a tensor."""

PLAIN = ("mapped", "put together", "cut")
"""Kinds that are only counted in print."""


@dataclass(frozen=True)
class Row:
    """What became of one tensor: the names that were read, the names that were written."""

    kind: str
    read: tuple[str, ...]
    wrote: tuple[str, ...]
    shape: Shape
    note: str = ""

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def line(self) -> str:
        """One line of text, the same for all layers."""
        shape = "x".join(map(str, self.shape))
        return pattern(
            f"{' + '.join(self.read) or '-'} -> {' + '.join(self.wrote) or '-'}  {shape}  {self.note}"
        ).rstrip()


@dataclass(frozen=True)
class Allowed:
    """Exceptions from strictness: exact names, or beginnings of names that end in ``*``."""

    missing: Sequence[str] = ()
    extra: Sequence[str] = ()
    changed: Sequence[str] = ()


STRICT = Allowed()
"""No exception."""


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of the patterns, or begins with one that ends in ``*``."""
    return any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in patterns)


@dataclass
class Report:
    """A whole conversion."""

    command: str
    sources: Mapping[str, str]
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    """Sentences by title: the check, time and memory."""
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Bytes and sha256 of each file, by its path inside the folder that holds the report."""

    def write(self, folder: Path) -> None:
        """Digest every file of the folder and write conversion.json beside them."""
        self.outputs = {
            path.relative_to(folder).as_posix(): files.digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != REPORT
        }
        files.write_json(folder / REPORT, asdict(self))

    def text(self) -> str:
        """What to print: counts, everything that is not plainly mapped, checks, outputs with sha256."""
        lines = []
        for kind, meaning in KINDS.items():
            found = [row for row in self.rows if row.kind == kind]
            if not found:
                continue
            lines.append(f"{kind:14} {len(found):5}  {meaning}")
            if kind not in PLAIN:
                lines += [f"    {line}" for line in _grouped(found)]
        lines += [f"{name}: {text}" for name, text in self.facts.items()]
        lines += [f"{entry['sha256']}  {name}  {entry['bytes']:,} bytes" for name, entry in self.outputs.items()]
        return "\n".join(lines)


def pattern(name: str) -> str:
    """``blocks.{i}.norm`` for ``blocks.3.norm``."""
    return re.sub(r"\b(blocks|layers)\.\d+\.", r"\1.{i}.", name)


def _grouped(rows: Iterable[Row]) -> list[str]:
    """A line for all rows that say the same of different layers."""
    counts = Counter(row.line() for row in rows)
    return [line if count == 1 else f"{line}  ({count} times)" for line, count in counts.items()]


@dataclass(frozen=True)
class Match:
    """Which tensors of a table are to be read, which have to be drawn, and the rows that say so."""

    table: NameTable
    drawn: tuple[str, ...]
    rows: tuple[Row, ...]


def match(
    found: Mapping[str, TensorFact],
    table: NameTable,
    wanted: Mapping[str, Shape],
    *,
    source: str,
    allowed: Allowed,
    unused: Sequence[str] = (),
) -> Match:
    """Compare what a source holds with what a model needs.

    found   the source's tensors
    table   our names to theirs
    wanted  our names to the model's shapes
    unused  patterns of names that may be there and are not read

    Errors: CheckpointError listing everything missing, extra or of another shape that is not allowed by name.
    """
    rows: list[Row] = []
    refused: list[str] = []
    kept: dict[str, tuple[str, ...]] = {}
    drawn: list[str] = []
    known = {name for names in table.values() for name in names}
    for ours, theirs in table.items():
        absent = [name for name in theirs if name not in found]
        shape = () if absent else _together([found[name].shape for name in theirs])
        kind = "missing" if absent else "shape-changed" if shape != wanted[ours] else ""
        names = [name for name in theirs if name not in found] if absent else list(theirs)
        if not kind:
            kept[ours] = theirs
            rows.append(Row("mapped" if len(theirs) == 1 else "put together", theirs, (ours,), wanted[ours]))
        elif all(fits(name, allowed.missing if absent else allowed.changed) for name in names):
            drawn.append(ours)
            note = "" if absent else f"{shape} in the source"
            rows.append(Row(kind, tuple(name for name in theirs if name in found), (ours,), wanted[ours], note))
        elif absent:
            refused += [f"  missing: {name} (for {ours} {wanted[ours]})" for name in names]
        else:
            refused.append(f"  shape-changed: {' + '.join(theirs)} is {shape}, the model needs {wanted[ours]}")
    for name in sorted(found.keys() - known):
        if fits(name, unused) or fits(name, allowed.extra):
            rows.append(Row("left out" if fits(name, unused) else "extra", (name,), (), found[name].shape))
        else:
            refused.append(f"  extra: {name} {found[name].shape}")
    if refused:
        raise CheckpointError(refusal(source, refused))
    return Match(kept, tuple(drawn), tuple(rows))


def refusal(source: str, lines: Sequence[str]) -> str:
    """The message of a strict comparison that failed."""
    shown = [*lines[:40], *([f"  and {len(lines) - 40} more"] if len(lines) > 40 else [])]
    return (
        f"The tensors of {source} are not those of the model ({len(lines)} differences):\n"
        + "\n".join(shown)
        + "\nGive the folder, the file or the sizes (--model) that belong together, or name an exception: "
        "--allow-missing, --allow-extra, --allow-changed NAME (a trailing * stands for any ending)."
    )


def _together(shapes: Sequence[Shape]) -> Shape:
    """Shape of tensors put together along axis 0; () where their other axes differ."""
    if len(shapes) == 1:
        return shapes[0]
    if len({shape[1:] for shape in shapes}) > 1 or not all(shapes):
        return ()
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
