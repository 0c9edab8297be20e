"""The versions of the public kit's rules."""

from enum import StrEnum


class Rules(StrEnum):
    """Which VLMEvalKit's rules read and score a reply."""

    MAR2025 = "mar2025"
    """Commit 0de60d7 of 2025-03-04, the last before the paper."""
    HEAD2026 = "head2026"
    """Commit e8e78f0 of 2026-08-18."""

    @property
    def full_name(self) -> str:
        """As printed beside a score."""
        commit = {"mar2025": "0de60d7", "head2026": "e8e78f0"}[self.value]
        return f"VLMEvalKit {self.value} ({commit})"
