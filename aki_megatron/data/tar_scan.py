"""Find the samples of a tar by its members' names, grouped as webdataset groups them.

A sample is a run of members that share a name up to the first dot of its last part: ``000012.jpg`` (or another of
IMAGE_SUFFIXES), ``000012.txt`` and, optionally, ``000012.json``. What is damaged or ambiguous becomes samples with an
error, one for each sample that is lost, never an exception.

webdataset's own group_by_keys is not used: it is given the bytes of every member, keeps the first of equal keys in a
row or ends the run, and reports nothing of what it leaves out. In whole tars and damaged ones both see the same
samples, but for what is refused here: equal keys in a row, names that lead out of the tar, and sparse files (whose
holes webdataset fills with zeros).
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from aki_megatron.data.file_kind import HEAD_BYTES, file_kind, is_known_kind
from aki_megatron.data.tar_members import (
    EMPTY_RANGE,
    MAX_MEMBER_BYTES,
    ByteRange,
    Member,
    find_header,
    iter_members,
    parse_header,
    printable,
)

IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
"""Suffixes of images; where a sample has several, the first of these is read. Of at most four letters."""

TEXT_SUFFIX = "txt"
JSON_SUFFIX = "json"

REPEATED = (
    "this key occurs several times in a row, so its members cannot be told apart; give every sample a key of its own."
)
DOTTED = (
    "the name has a dot before its suffix, and a key ends at the first dot (as in webdataset); rename the members "
    "without it (2023_0.jpg for 2023.0.jpg)."
)
APART = (
    "its image and its text are apart in the tar, and the members of a sample must follow each other (as in "
    "webdataset); pack the files again with tar --sort=name."
)
_LACKS = ("no image member", "no txt member", "no txt and image member")
LOST = "it lies behind the point where the tar is damaged, and nothing from there on is read; repair the tar."


_META = re.compile(r"__[^/]*__(/|$)")
"""What webdataset skips: __meta__.json__, and whatever is in a folder __meta__."""


class TarSample(NamedTuple):
    """One sample: its key, its members (json may be empty), the image's suffix; or ``error``: why it is unreadable.

    ``damaged`` marks the point where the tar is cut off or malformed, and a file that is no tar. What is found behind
    that point has an error too.
    """

    key: str
    text: ByteRange = EMPTY_RANGE
    image: ByteRange = EMPTY_RANGE
    json: ByteRange = EMPTY_RANGE
    image_suffix: str = ""
    error: str = ""
    damaged: bool = False


@dataclass
class _Run:
    """The members of one key that follow each other: suffix -> bytes, or -> why they cannot be used."""

    key: str
    lost: bool = False
    members: dict[str, ByteRange] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    occurrences: dict[str, int] = field(default_factory=dict)


def scan_tar(tar: Path) -> Iterator[TarSample]:
    """Yield the samples of a tar in their order. Raises OSError where the file cannot be read."""
    handle = os.open(tar, os.O_RDONLY)
    try:
        if kind := _foreign_kind(handle):
            error = f"the file is no tar but {kind}; put an uncompressed tar there, or fetch it again."
            yield TarSample("", error=error, damaged=True)
            return
        yield from _join_apart(list(_group(iter_members(handle, os.fstat(handle).st_size))))
    finally:
        os.close(handle)


def _join_apart(samples: list[TarSample]) -> Iterator[TarSample]:
    """Yield the samples; of those whose members are apart, as in a tar of files by suffix, each once with that error.

    Their parts are incomplete samples of one key: one with the text, one with the image, maybe one with neither.
    """
    parts: dict[str, list[str]] = {}
    for sample in samples:
        if sample.error.startswith(_LACKS):
            parts.setdefault(sample.key, []).append(sample.error.partition(" (")[0])
    apart = {key for key, lacking in parts.items() if [lacking.count(what) for what in _LACKS[:2]] == [1, 1]}
    for sample in samples:
        if sample.key not in apart or not sample.error.startswith(_LACKS):
            yield sample
        elif sample.error.startswith(_LACKS[0]):
            yield sample._replace(error=APART)


def _group(members: Iterable[Member]) -> Iterator[TarSample]:
    """Yield the samples that members form, and of a damaged tar those that are lost, each counted once."""
    run, mark = _Run(""), TarSample("")
    for member in members:
        key, suffix = split_name(member.name)
        if member.damage:
            mark = TarSample(printable(key), error=member.problem, damaged=True)
            if key != run.key or _is_whole(run):
                yield from _finish_samples(run)
                run = _Run("")
            else:
                run = _Run(key, lost=True, occurrences=run.occurrences)  # the damage cuts this sample in two
        elif key and (not member.problem or suffix in (TEXT_SUFFIX, *IMAGE_SUFFIXES)):
            if key != run.key:
                samples = list(_finish_samples(run))
                if run.lost and samples and mark.damaged:  # the first that is lost stands for the damage
                    samples, mark = [mark, *samples[1:]], TarSample("")
                yield from samples
                run = _Run(key, member.lost)
            _add_member(run, suffix, member)
    samples = list(_finish_samples(run))
    yield from [mark, *samples[1:]] if mark.damaged and (run.lost or not samples) else samples


def split_name(name: str) -> tuple[str, str]:
    """Return (key, suffix) of a member; an empty key for one of no sample (as in webdataset: .DS_Store, README)."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or _META.match(name):
        return "", ""
    return f"{folder}{slash}{stem}", suffix.lower()


def _foreign_kind(handle: int) -> str:
    """Return what a file is that holds no header of a tar; empty for a tar, damaged ones and empty ones included."""
    head = os.pread(handle, HEAD_BYTES, 0)
    if head and (not any(head) or parse_header(head.ljust(HEAD_BYTES, b"\0")) is not None):
        return ""
    kind = file_kind(head)
    # an archive that is not compressed may hold a tar whole, and so its headers
    return kind if is_known_kind(kind) or find_header(handle, 0) is None else ""


def _is_whole(run: _Run) -> bool:
    return bool(run.occurrences) and not _sample(run).error


def _add_member(run: _Run, suffix: str, member: Member) -> None:
    run.occurrences[suffix] = run.occurrences.get(suffix, 0) + 1
    if member.problem:
        run.problems[suffix] = member.problem
    else:
        run.members[suffix] = member.data


def _finish_samples(run: _Run) -> Iterator[TarSample]:
    """Yield the sample of a finished run of members, if there was one; of an unreadable run, all that it stands for."""
    if not run.occurrences:
        return
    sample = _sample(run)
    keys = [sample.key]
    if sample.error and not set(run.occurrences) & {TEXT_SUFFIX, *IMAGE_SUFFIXES}:
        keys = _dotted_keys(run) or keys
        if sample.key not in keys and not run.lost:
            sample = sample._replace(error=DOTTED)
    times = max(run.occurrences.values()) if sample.error else 1
    for key in keys:
        yield from [sample._replace(key=key)] * times


def _dotted_keys(run: _Run) -> list[str]:
    """Return the keys that a run's members would have if keys ended at the last dot, of those with text and image."""
    suffixes: dict[str, set[str]] = {}
    for name in run.occurrences:
        stem, _, suffix = name.rpartition(".")
        suffixes.setdefault(stem, set()).add(suffix)
    whole = [stem for stem, found in suffixes.items() if stem and TEXT_SUFFIX in found and found & set(IMAGE_SUFFIXES)]
    return [printable(f"{run.key}.{stem}") for stem in whole]


def _sample(run: _Run) -> TarSample:
    """Return the sample of a run."""
    members = run.members
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), "")
    text, image = members.get(TEXT_SUFFIX), members.get(suffix)
    name = printable(run.key)
    if run.lost:
        return TarSample(name, error=LOST)
    if run.key.startswith("/") or ".." in run.key.split("/"):
        return TarSample(name, error="the name leads out of the tar; keys are relative and have no '..'.")
    if max(run.occurrences.values()) > 1:
        return TarSample(name, error=REPEATED)
    if image is None or text is None:
        return TarSample(name, error=_lacking(run, lacks_text=text is None, lacks_image=image is None))
    if max(text.size, image.size) > MAX_MEMBER_BYTES:
        return TarSample(name, error=f"a member of {max(text.size, image.size)} bytes; {MAX_MEMBER_BYTES} at most.")
    json = members.get(JSON_SUFFIX, EMPTY_RANGE)
    return TarSample(name, text, image, json if json.size <= MAX_MEMBER_BYTES else EMPTY_RANGE, suffix)


def _lacking(run: _Run, *, lacks_text: bool, lacks_image: bool) -> str:
    """Return the error of a sample without text or image."""
    for suffix, problem in run.problems.items():
        if (suffix == TEXT_SUFFIX and lacks_text) or (suffix in IMAGE_SUFFIXES and lacks_image):
            return f"its {suffix} {problem}."
    what = " and ".join(what for what, lacks in (("txt", lacks_text), ("image", lacks_image)) if lacks)
    found = printable(", ".join(sorted(run.occurrences)))
    images = f"; an image ends in {', '.join(IMAGE_SUFFIXES)}" if lacks_image else ""
    return f"no {what} member (found: {found}{images})."
