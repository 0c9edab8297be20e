"""Match the tensors of a source with those of a model, strictly, and report what a conversion did to each of them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.shapes import compare_shapes, mismatch_error
from aki_megatron.checkpoint.tensors import NameTable, Shape, TensorSource, TensorSpec

REPORT = "conversion.json"

KINDS = {
    "mapped": "one tensor became one of the same shape",
    "concatenated": "several tensors became one, along axis 0",
    "split": "one tensor became several, along axis 0",
    "extended": "the tensor has fewer rows in the source; the further rows are newly initialized",
    "initialized": "the source has no such tensor; initialized as in a run that starts with random weights",
    "missing": "not in the source, allowed by name; initialized",
    "mismatched": "of another shape in the source, allowed by name; initialized",
    "unexpected": "only in the source, allowed by name; skipped",
    "skipped": "only in the source, and not used by any AKI model",
}
"""What a conversion can do with a tensor."""

LISTED = ("extended", "missing", "mismatched", "unexpected")
"""Kinds of which the printed report has a line for each tensor, or for the same tensor of all layers."""

GROUPED = ("initialized", "skipped")
"""Kinds of which it has the number in each part of the model; of the others it has the number."""

MAX_LINES = 5
"""Lines of one kind that it has at most; conversion.json has all."""

EXCEPTIONS_HINT = (
    "Give the folder, the file or the sizes (--model) that belong together, or name an exception: --allow-missing, "
    "--allow-unexpected, --allow-mismatched NAME (a trailing * matches any ending)."
)


@dataclass(frozen=True)
class TensorRecord:
    """What became of one tensor."""

    kind: str
    source_names: tuple[str, ...]
    """Names that were read."""
    target_names: tuple[str, ...]
    """Names that were written."""
    shape: Shape
    note: str = ""

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def text(self) -> str:
        """One line, the same for all layers."""
        shape = "x".join(map(str, self.shape))
        names = f"{' + '.join(self.source_names) or '-'} -> {' + '.join(self.target_names) or '-'}"
        return layer_pattern(f"{names}  {shape}  {self.note}").rstrip()

    def part(self) -> str:
        """The part of the model that it belongs to: ``input_embedder.resampler``."""
        (name, *_) = self.target_names or self.source_names
        return ".".join(name.split(".")[:2])


@dataclass(frozen=True)
class AllowedMismatches:
    """Exceptions from strictness: names, or prefixes of names that end in ``*``."""

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    mismatched: Sequence[str] = ()


STRICT = AllowedMismatches()
"""No exceptions."""


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name equals one of the patterns, or starts with one that ends in ``*``."""
    return any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in patterns)


def layer_pattern(name: str) -> str:
    """``layers.{i}.norm`` for ``layers.3.norm``."""
    return re.sub(r"\blayers\.\d+\.", "layers.{i}.", name)


@dataclass
class ConversionReport:
    """A whole conversion."""

    command: str
    sources: Mapping[str, str]
    records: list[TensorRecord] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    """Sentences by title: the logits check, time and memory."""
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Bytes and sha256 of each file, by its path inside the folder that holds the report."""

    def write(self, folder: Path) -> None:
        """Hash every file of ``folder`` and write conversion.json into it."""
        self.outputs = {
            path.relative_to(folder).as_posix(): files.file_digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != REPORT
        }
        files.write_json(folder / REPORT, asdict(self))

    def text(self) -> str:
        """What to print: a line for each kind, what is out of the ordinary, notes, and the size of what was written."""
        lines = []
        for kind, meaning in KINDS.items():
            records = [record for record in self.records if record.kind == kind]
            if not records:
                continue
            lines.append(f"{kind:14} {len(records):5}  {meaning}")
            if kind in LISTED:
                lines += _shortened(Counter(record.text() for record in records), " times")
            if kind in GROUPED:
                lines += _shortened(Counter(record.part() for record in records), " tensors")
        lines += [f"{title}: {text}" for title, text in self.notes.items()]
        size = sum(entry["bytes"] for entry in self.outputs.values())
        lines.append(
            f"{len(self.outputs)} files, {size:,} bytes; {REPORT} has what became of every tensor, and the sha256 of "
            "every file"
        )
        return "\n".join(lines)


def _shortened(counts: Counter[str], unit: str) -> list[str]:
    """Return the first lines with how often each occurs, and the number of the others."""
    lines = [f"    {line}" + (f"  ({count}{unit})" if count > 1 else "") for line, count in counts.items()]
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], f"    and {len(lines) - MAX_LINES + 1} more"]


@dataclass(frozen=True)
class TensorMatch:
    """The outcome of ``match_tensors``."""

    table: NameTable
    """The rows of the name table that can be read from the source."""
    to_initialize: tuple[str, ...]
    """Native names that the source should hold and does not; exceptions allow it."""
    records: tuple[TensorRecord, ...]


def match_tensors(
    found: Mapping[str, TensorSpec],
    table: NameTable,
    expected: Mapping[str, Shape],
    *,
    source: str,
    allowed: AllowedMismatches = STRICT,
) -> TensorMatch:
    """Match the tensors of a source with those that a model needs of it.

    found     specs of the source's tensors, by external name
    table     native name -> external names, for every tensor that the source should hold
    expected  shapes by native name
    source    what to call the source in the error

    Raises CheckpointError with everything missing, unexpected or of another shape that ``allowed`` does not name.
    """
    shapes = {
        native: _concatenated_shape([found[name].shape for name in external])
        for native, external in table.items()
        if all(name in found for name in external)
    }
    comparison = compare_shapes(shapes, {native: expected[native] for native in table})
    readable: dict[str, tuple[str, ...]] = {}
    to_initialize: list[str] = []
    records: list[TensorRecord] = []
    refused: list[str] = []
    for native, external in table.items():
        if native not in (*comparison.missing, *comparison.mismatched):
            readable[native] = external
            kind = "mapped" if len(external) == 1 else "concatenated"
            records.append(TensorRecord(kind, external, (native,), expected[native]))
            continue
        outcome = _allow_or_refuse(native, external, found, expected[native], allowed)
        if isinstance(outcome, TensorRecord):
            to_initialize.append(native)
            records.append(outcome)
        else:
            refused += outcome
    refused += [
        f"dtype: {name} is stored as {str(found[name].dtype).removeprefix('torch.')}, a weight is floating point"
        for external in readable.values()
        for name in external
        if not found[name].dtype.is_floating_point
    ]
    unexpected = sorted(found.keys() - {name for external in table.values() for name in external})
    skipped = [name for name in unexpected if matches_any(name, allowed.unexpected)]
    records += [TensorRecord("unexpected", (name,), (), found[name].shape) for name in skipped]
    refused += [f"unexpected: {name} {found[name].shape}" for name in unexpected if name not in skipped]
    if refused:
        raise mismatch_error(source, refused, EXCEPTIONS_HINT)
    return TensorMatch(readable, tuple(to_initialize), tuple(records))


def _allow_or_refuse(
    native: str,
    external: tuple[str, ...],
    found: Mapping[str, TensorSpec],
    shape: Shape,
    allowed: AllowedMismatches,
) -> TensorRecord | list[str]:
    """Return the record of a missing or mismatched tensor if ``allowed`` names it, else lines of the error."""
    missing = [name for name in external if name not in found]
    if missing:
        if all(matches_any(name, allowed.missing) for name in missing):
            present = tuple(name for name in external if name in found)
            return TensorRecord("missing", present, (native,), shape)
        return [f"missing: {name} (for {native} {shape})" for name in missing]
    found_shapes = [found[name].shape for name in external]
    found_shape = _concatenated_shape(found_shapes) or ", ".join(map(str, found_shapes))
    if all(matches_any(name, allowed.mismatched) for name in external):
        return TensorRecord("mismatched", external, (native,), shape, f"{found_shape} in the source")
    return [f"shape mismatch: {' + '.join(external)} is {found_shape}, the model needs {shape}"]


def external_records(native: TensorSource, table: NameTable) -> list[TensorRecord]:
    """Records of a conversion from native names to external ones."""
    return [
        TensorRecord("mapped" if len(external) == 1 else "split", (name,), tuple(external), native.specs[name].shape)
        for name, external in table.items()
    ]


def skipped_records(source: TensorSource, names: Iterable[str]) -> list[TensorRecord]:
    """Records of tensors that a conversion does not use."""
    return [TensorRecord("skipped", (name,), (), source.specs[name].shape) for name in names]


def _concatenated_shape(shapes: Sequence[Shape]) -> Shape | None:
    """Shape of tensors concatenated along axis 0; None where they cannot be."""
    if len(shapes) == 1:
        return shapes[0]
    if len({shape[1:] for shape in shapes}) > 1 or not all(shapes):
        return None
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
