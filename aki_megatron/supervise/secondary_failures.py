"""Distinguish the errors that the end of another rank causes from errors of this rank."""

from collections.abc import Iterator

import torch.distributed as dist

from aki_megatron.errors import UserError
from aki_megatron.masking import mask_text

SECONDARY_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "/gloo/",
    "NCCL",
)
"""Parts of the messages of RuntimeErrors that the end of another rank causes."""

MAX_TEXT_CHARACTERS = 600
"""Length of an unexpected error on stderr; the log has all of it."""


def is_secondary_failure(error: BaseException) -> bool:
    """Return whether an error, or one that led to it, is what a rank meets when another one has ended."""
    return any(
        isinstance(cause, dist.DistError)
        or (isinstance(cause, RuntimeError) and any(part in str(cause) for part in SECONDARY_MESSAGES))
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def format_error(error: BaseException) -> str:
    """Return an error on one line, without secrets; a UserError keeps its own line breaks."""
    text = mask_text(str(error))
    if not isinstance(error, UserError):
        text = " ".join(text.split())[:MAX_TEXT_CHARACTERS]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
