"""Fingerprints of what a run reads: every checkpoint holds them, and a resumed run is compared with them.

A fingerprint is of content, whatever its path and its times of modification. What each source and the tokenizer are
made of are its parts:

    annotation file   sha256 of all its bytes (1.6 GB/s; the eleven datasets have 2 GB)
    tokenizer file    the same, of the files that decide the ids
    tar               the digest of its samples that its index holds, so that no tar is read: whole texts, sizes and
                      both ends of the images
    folder of images  names and sizes of all images, and the bytes of 256 of them, spread evenly; so an image that is
                      replaced by another of its size may go unnoticed in a folder of more (the sample audit log
                      differs then)
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError
from aki_megatron.masking import mask_text

VERSION = 1
"""Of the fingerprints in a checkpoint; others are not compared."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a tokenizer's folder that decide its ids."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
ALL_IMAGE_SUFFIXES = (*IMAGE_SUFFIXES, ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")
"""Suffixes of what data/image.py reads, for folders of one's own; in those of the datasets the others never counted."""

NUM_READ_IMAGES = 256
"""Images of a folder whose bytes are read."""

_DIGEST_DIGITS = 32
_NUM_THREADS, _CHUNK = 16, 256  # a network disk serves many requests at once, one at a time slowly


@dataclass(frozen=True)
class Part:
    """One file, tar or folder of images.

    digest    of its content, hexadecimal
    counts    what else of it is compared, for people: bytes, samples, images
    location  where it is now, for people; not compared and not saved
    """

    digest: str
    counts: Mapping[str, int]
    location: str = field(default="", compare=False)

    def describe(self) -> str:
        """Return its counts and the beginning of its digest."""
        counts = ", ".join(f"{number:,} {name}" for name, number in self.counts.items())
        digest = f"digest {self.digest[:12]}"
        return f"{counts} ({digest})" if counts else digest


@dataclass(frozen=True)
class Fingerprint:
    """Of one source, or of the tokenizer: its number of records (tokens of a tokenizer), and its parts by name."""

    num_records: int
    parts: Mapping[str, Part]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        parts = {name: {"digest": part.digest, **part.counts} for name, part in self.parts.items()}
        return {"records": self.num_records, "parts": parts}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Fingerprint":
        """Return what ``to_json`` was called on."""
        parts = {}
        for name, part in values["parts"].items():
            counts = {key: int(number) for key, number in part.items() if key != "digest"}
            parts[str(name)] = Part(str(part["digest"]), counts)
        return cls(int(values["records"]), parts)


def fingerprint_differences(what: str, saved: Fingerprint, now: Fingerprint) -> list[str]:
    """Return a line for each difference between two fingerprints of ``what``; empty where they are equal."""
    lines = []
    if saved.num_records != now.num_records:
        lines.append(f"{what}: was {saved.num_records:,} records, is {now.num_records:,}")
    for name in dict.fromkeys([*saved.parts, *now.parts]):
        before, after = saved.parts.get(name), now.parts.get(name)
        if before == after:
            continue
        location = f" ({mask_text(after.location)})" if after is not None and after.location else ""
        was = before.describe() if before is not None else "absent"
        lines.append(f"{what}, {name}{location}: was {was}, is {after.describe() if after is not None else 'absent'}")
    return lines


def tokenizer_fingerprint(folder: Path, num_tokens: int) -> Fingerprint:
    """Return the fingerprint of a tokenizer's folder, which has ``num_tokens`` tokens."""
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return Fingerprint(num_tokens, {f"file {name}": _file_part(folder / name) for name in present})


def tars_fingerprint(tars: Sequence[Part], num_samples: int) -> Fingerprint:
    """Return the fingerprint of tars in their order, which decides the numbers of their samples."""
    return Fingerprint(num_samples, {f"tar {number}": tar for number, tar in enumerate(tars)})


class FileFingerprints:
    """Fingerprints of datasets below one root; a file or folder that several of them share is read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parts: dict[str, Part] = {}

    def fingerprint(self, names: Sequence[str], num_records: int) -> Fingerprint:
        """Return the fingerprint of a dataset with these annotation files and folders of images below the root.

        Raises DataError where a file cannot be read.
        """
        return Fingerprint(num_records, dict(self._part(name) for name in names))

    def numbered_fingerprint(
        self, files: Sequence[Path], images: Path | None, num_records: int, suffixes: tuple[str, ...]
    ) -> Fingerprint:
        """Return the fingerprint of files in their order, wherever they are, and of a folder of images if any."""
        parts = {}
        for number, file in enumerate(files):
            parts[f"file {number}"] = self._cached(str(file), partial(_file_part, file))
        if images is not None:
            name = f"{images} {' '.join(suffixes)}"
            parts["images"] = self._cached(name, partial(_images_part, images, suffixes))
        return Fingerprint(num_records, parts)

    def _part(self, name: str) -> tuple[str, Part]:
        path = self.root / name
        is_folder = path.is_dir()
        part = self._cached(name, partial(_images_part if is_folder else _file_part, path))
        return f"{'images' if is_folder else 'file'} {name}", part

    def _cached(self, name: str, read: Callable[[], Part]) -> Part:
        if name not in self._parts:
            self._parts[name] = read()
        return self._parts[name]


def _file_part(path: Path) -> Part:
    try:
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
            return Part(digest[:_DIGEST_DIGITS], {"bytes": os.fstat(file.fileno()).st_size}, str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _images_part(path: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Part:
    folder = f"{path}/"
    names = sorted(_image_names(folder, suffixes))
    last = len(names) - 1
    numbers = {last * number // (NUM_READ_IMAGES - 1) for number in range(NUM_READ_IMAGES)} if names else set()
    read = [names[number] for number in sorted(numbers)]
    digest, num_bytes = sha256(), 0
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        sizes = _map_chunks(pool, lambda name: _size(folder + name), names)
        contents = _map_chunks(pool, lambda name: _content(folder + name), read)
    for name, size in zip(names, sizes, strict=True):
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        num_bytes += max(size, 0)
    for content in contents:
        digest.update(content)
    return Part(digest.hexdigest()[:_DIGEST_DIGITS], {"images": len(names), "bytes": num_bytes}, str(path))


def _image_names(
    folder: str, suffixes: tuple[str, ...], below: str = "", above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    """Yield the names of all images in a folder and the folders in it, hidden ones left out.

    above  device and inode of the folders around it: a link that leads back to one of them is not followed
    """
    try:
        found = os.stat(folder + below)
        if (found.st_dev, found.st_ino) in above:
            return
        with os.scandir(folder + below) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(suffixes):
                    yield below + entry.name
                elif entry.is_dir():
                    inside = above | {(found.st_dev, found.st_ino)}
                    yield from _image_names(folder, suffixes, f"{below}{entry.name}/", inside)
    except OSError as error:
        raise DataError(f"The folder of images {folder}{below} cannot be read: {error}") from error


def _map_chunks(pool: ThreadPoolExecutor, function: Callable[[str], Any], names: Sequence[str]) -> list[Any]:
    chunks = [names[begin : begin + _CHUNK] for begin in range(0, len(names), _CHUNK)]
    results = pool.map(lambda chunk: [function(name) for name in chunk], chunks)
    return [result for chunk in results for result in chunk]


def _size(path: str) -> int:
    """Return the size of a file; -1 where it cannot be had, as of a link that leads nowhere."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _content(path: str) -> bytes:
    """Return the digest of a file, empty for one that cannot be read: a bad sample, which the run counts."""
    try:
        with open(path, "rb") as file:
            return file_digest(file, "sha256").digest()
    except OSError:
        return b""
