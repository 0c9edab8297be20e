"""What a check of a source found, as lines of text."""

from collections import Counter
from collections.abc import Iterator

from aki_megatron.config.data import DataConfig
from aki_megatron.data.check import SourceCheck
from aki_megatron.data.release_counts import release_count
from aki_megatron.data.run_sources import SPLIT

MAX_KINDS = 20
"""Kinds of faults that are listed."""

_BAR_WIDTH = 40


def report_lines(found: SourceCheck, config: DataConfig) -> Iterator[str]:
    """Yield what was found in a source beside the counts of its release, and whether a run would stop."""
    if found.cannot_open:
        yield f"{found.name}: CANNOT BE READ: {found.cannot_open}"
        return
    release = release_count(found.name, SPLIT)
    looked_at = "" if found.num_checked == found.num_records else f", {found.num_checked:,} of them checked"
    yield f"{found.name}: {found.num_records:,} records{_released(release.records)}{looked_at}"
    yield f"  readable       {found.num_readable:,} of {found.num_checked:,}"
    if found.image_uses:
        # a part of the samples uses a part of the images
        released = _released(release.images if found.num_checked == found.num_records else None)
        yield f"  image files    {len(found.image_uses):,}{released}; missing for {found.num_missing:,} samples"
    if found.token_counts:
        yield f"  text tokens    {_token_summary(found.token_counts)}"
        yield from (f"    {line}" for line in histogram_lines(found.token_counts))
        yield f"  over the cap   {found.num_over_cap:,} samples cut at data.max_text_tokens={config.max_text_tokens}"
    yield from _fault_lines(found)
    yield from (f"  {note}" for note in found.notes)
    if found.is_refused(config.max_bad_fraction):
        yield f"  A RUN WOULD STOP: more is bad than data.max_bad_fraction={config.max_bad_fraction} allows"


def _fault_lines(found: SourceCheck) -> Iterator[str]:
    for title, faults in (("malformed records", found.malformed), ("bad samples", found.faults)):
        if faults.total:
            yield f"  {title}: {faults.total:,}, the first of each kind:"
            yield from (f"    {line}" for line in faults.lines(MAX_KINDS))
    if not (found.malformed.total or found.faults.total):
        yield "  faults         none"


def histogram_lines(counts: Counter[int]) -> Iterator[str]:
    """Yield a line with a bar for every range of lengths 0-7, 8-15, 16-31, ... between the shortest and the longest."""
    by_bits: Counter[int] = Counter()
    for length, number in counts.items():
        by_bits[max(3, length.bit_length())] += number
    most = max(by_bits.values())
    for bits in range(min(by_bits), max(by_bits) + 1):
        first = 0 if bits == 3 else 2 ** (bits - 1)
        number = by_bits[bits]
        bar = "#" * -(-number * _BAR_WIDTH // most)
        yield f"{first:>6} - {2**bits - 1:<6} {number:>12,} {bar}".rstrip()


def _token_summary(counts: Counter[int]) -> str:
    total = counts.total()
    mean = sum(length * number for length, number in counts.items()) / total
    return (
        f"mean {mean:.1f}, median {_quantile(counts, 0.5)}, 99 % at most {_quantile(counts, 0.99)}, "
        f"longest {max(counts)}"
    )


def _quantile(counts: Counter[int], fraction: float) -> int:
    seen, wanted = 0, fraction * counts.total()
    for length in sorted(counts):
        seen += counts[length]
        if seen >= wanted:
            return length
    return max(counts)


def _released(number: int | None) -> str:
    return "" if number is None else f" (release: {number:,})"
