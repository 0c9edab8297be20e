"""Report tars whose samples cannot all be read: which, how many samples of how many, and why."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aki_megatron.data.tar_index import IndexHeader, TarIndex, index_path, read_header

STATS_SUFFIX = "_stats.json"
"""img2dataset writes ``00000_stats.json`` beside ``00000.tar``; "successes" is the number of samples it wrote."""

_MIN_WHOLE_TARS = 3
_MAX_REASONS = 5


@dataclass(frozen=True)
class TarDamage:
    """A tar with unreadable samples.

    num_samples  samples found, readable or not
    num_absent   samples that are not even found in a tar that is cut off, as far as that is known (``absent_samples``)
    reasons      (error, number of samples, first key), the damage of the tar first
    is_damaged   the tar is cut off, malformed or no tar
    """

    tar: str
    num_readable: int
    num_samples: int
    num_absent: int
    reasons: tuple[tuple[str, int, str], ...]
    is_damaged: bool

    def __str__(self) -> str:
        total = self.num_samples + self.num_absent
        known = "at least " if self.is_damaged and not self.num_absent else ""
        if not total:
            return f"{self.tar}: no sample in it."
        counts = f"{self.num_readable:,} of {known}{total:,} samples readable."
        if self.is_damaged and total == 1:
            counts = "no sample readable, of an unknown number."
        lines = [f"{self.tar}: {counts}"]
        for error, count, key in self.reasons[:_MAX_REASONS]:
            first = f"key {key}" if count == 1 else f"{count:,} samples, the first {key}"
            lines.append(f"{first}: {error}" if key else error)
        if self.num_absent:
            lines.append(
                f"About {self.num_absent:,} of the samples are not in the file at all, to judge by its {STATS_SUFFIX} "
                "or by the other tars; they count as unreadable."
            )
        return " ".join(lines)


def tar_damage(tar: object, index: Path, num_absent: int = 0) -> TarDamage:
    """Return what is wrong with a tar, as its index says it. Raises DataError where the index cannot be read."""
    opened = TarIndex(index)
    counts: dict[str, int] = {}
    first_keys: dict[str, str] = {}
    damages: list[str] = []
    for sample in opened.errors():
        counts[sample.error] = counts.get(sample.error, 0) + 1
        first_keys.setdefault(sample.error, sample.key)
        if sample.damaged:
            damages.append(sample.error)
    order = [*damages, *sorted(set(counts) - set(damages), key=lambda error: -counts[error])]
    reasons = tuple((error, counts[error], first_keys[error]) for error in order)
    header = opened.header
    return TarDamage(
        str(tar), header.num_readable, header.num_samples, num_absent, reasons, is_damaged=bool(header.is_damaged)
    )


def tar_damages(tars: Sequence[Path]) -> list[TarDamage]:
    """Return the tars with unreadable samples or none, each folder a set; tars without an index are skipped."""
    folders: dict[Path, list[tuple[Path, IndexHeader]]] = {}
    for tar in tars:
        if (header := read_header(index_path(tar))) is not None:
            folders.setdefault(tar.parent, []).append((tar, header))
    return [damage for pairs in folders.values() for damage in _damages_of_set(pairs)]


def _damages_of_set(pairs: Sequence[tuple[Path, IndexHeader]]) -> Iterator[TarDamage]:
    counts = np.array([header.num_samples for _, header in pairs], dtype=np.int64)
    is_damaged = np.array([header.is_damaged for _, header in pairs], dtype=np.bool_)
    absent = absent_samples([tar for tar, _ in pairs], counts, is_damaged).tolist()
    for (tar, header), lacking in zip(pairs, absent, strict=True):
        if header.num_readable < header.num_samples + lacking or not header.num_samples:
            yield tar_damage(tar, index_path(tar), lacking)


def absent_samples(
    tars: Sequence[Path | None], counts: NDArray[np.int64], is_damaged: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return for every tar how many samples a damaged one lacks; 0 for the others, and where it is not known.

    Known from img2dataset's statistics beside the tar; else what lacks to the median of the set's whole tars, of which
    there must be three.
    """
    absent = np.zeros(len(counts), dtype=np.int64)
    whole = counts[~is_damaged & (counts > 0)]
    usual = int(np.median(whole)) if len(whole) >= _MIN_WHOLE_TARS else 0
    for number in np.flatnonzero(is_damaged).tolist():
        tar = tars[number]
        expected = (_written_samples(tar) if tar is not None else None) or usual
        absent[number] = max(0, expected - int(counts[number]))
    return absent


def _written_samples(tar: Path) -> int | None:
    """Return the number of samples that img2dataset wrote into a tar; None where it does not say."""
    try:
        successes = json.loads(tar.with_name(tar.stem + STATS_SUFFIX).read_bytes())["successes"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return successes if isinstance(successes, int) and 0 <= successes < 2**31 else None
