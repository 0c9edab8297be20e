"""Mistakes a user can mend. In the lowest layer and without torch, so that a wrong flag is refused in a moment.

Everything above imports these names from ``aki_megatron.types``; config, which must stay light, imports them here.
"""

from aki_megatron.masking import mask_text


class UserError(Exception):
    """A mistake a user can mend. Launchers and tools print its message, no traceback, exit code 2.

    The message says what was got, what is allowed, and what to change. Secrets in it are masked.
    """

    def __str__(self) -> str:
        return mask_text(super().__str__())


class ConfigError(UserError):
    """A run configuration that is wrong in itself or contradicts another part."""


class DataError(UserError):
    """Missing, unreadable or malformed data; the message names the file and the key."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, corrupt, or of another model."""


class BaseWeightsError(CheckpointError):
    """The weights that a checkpoint leaves out are missing, or others than its run began with."""
