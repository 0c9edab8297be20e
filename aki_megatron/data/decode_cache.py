"""Keep small decoded media in memory: datasets ask several questions about one image or recording."""

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Generic, TypeVar

Decoded = TypeVar("Decoded")


class DecodeCache(Generic[Decoded]):
    """Decoded items by file, or by the hash of their bytes: two samples of one key may hold different ones.

    Items of more than ``max_item_bytes`` are never kept (so few of them fit that none is met again in time), and
    nothing is evicted once ``max_bytes`` are full. Safe to share between threads.
    """

    def __init__(self, item_bytes: int, *, max_bytes: int = 2**27, max_item_bytes: int = 2**16) -> None:
        """All items have ``item_bytes`` when they are decoded."""
        self._max_items = max_bytes // item_bytes if item_bytes <= max_item_bytes else 0
        self._cached: dict[Path | bytes, Decoded] = {}

    def get(self, content: Path | bytes, decode: Callable[[], Decoded]) -> Decoded:
        """Return what ``decode`` returned for this content, or returns now."""
        if not self._max_items:
            return decode()
        name = content if isinstance(content, Path) else blake2b(content, digest_size=16).digest()
        decoded = self._cached.get(name)
        if decoded is None:
            decoded = decode()
            if len(self._cached) < self._max_items:
                self._cached[name] = decoded
        return decoded
