"""Say what a file is by its first bytes, for messages about files that are not what their names say."""

import re

HEAD_BYTES = 512
"""First bytes of a file that ``file_kind`` looks at."""

TEXT_IN_UTF_16 = "text in UTF-16"

_MAGIC = (
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"8BPS", "a Photoshop image"),
    (b"II+\0", "a TIFF image"),
    (b"MM\0+", "a TIFF image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\x01\0", "a Windows icon"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x1f\x9d", "compress (.Z)"),
    (b"\x5d\0\0", "lzma"),
    (b"!<arch>", "an ar archive"),
    (b"070701", "a cpio archive"),
    (b"070707", "a cpio archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"PAR1", "parquet"),
    (b"ARROW1", "Arrow"),
    (b"SQLite format 3", "SQLite"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\x89HDF\r\n", "HDF5"),
    (b"\x1aE\xdf\xa3", "a video"),
    (b"version https://git-lfs", "a git-lfs pointer (fetch the file itself: git lfs pull)"),
)
_MARKUP = (
    *((tag, "HTML (an error page?)") for tag in (b"<!doctype html", b"<html", b"<head", b"<body", b"<title")),
    (b"<error", "XML (an error page?)"),
    (b"<svg", "an SVG image"),
    (b"<?xml", "XML (an error page?)"),
)
_PNM = re.compile(rb"P[1-6fF]\s")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image", b"heic": "a HEIC image", b"mif1": "a HEIC image"}
_SHOWN_BYTES = 24
_UNKNOWN = ("zeros", "text", "of no known format", "a tar")
_TEXT_BYTES = frozenset({9, 10, 13} | set(range(32, 127)) | set(range(128, 256)))


def file_kind(head: bytes) -> str:
    """Return what a file is, given its first bytes (HEAD_BYTES or fewer; empty for an empty file)."""
    if not head:
        return "empty (0 bytes)"
    if head[257:262] == b"ustar":  # first: a tar begins with a name, which may begin with any letters
        return "a tar"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WEBP image"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video")
    if not any(head):
        return "zeros"
    if _PNM.match(head):
        return "a PPM image"
    if head[:2] in _UTF_16:
        return TEXT_IN_UTF_16
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for tag, kind in _MARKUP:
        if text[: len(tag)].lower() == tag:
            return kind
    if set(head) - _TEXT_BYTES:
        return f"of no known format (first bytes {head[:8].hex(' ')})"
    return f"text that begins {ascii(head[:_SHOWN_BYTES].decode('utf-8', 'replace'))}"


def is_known_kind(kind: str) -> bool:
    """Return whether ``file_kind`` recognized a format, so that a file is surely nothing else."""
    return not kind.startswith(_UNKNOWN)
