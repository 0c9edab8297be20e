"""Exit codes of the launchers. Standard library only: launchers import this before anything slow."""

FAILED = 1
"""An error that the user did not cause."""

USER_ERROR = 2
"""A mistake the user can correct (errors.UserError)."""

INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, as shells report it."""

USER_ERROR_GRACE_SECONDS = 5.0
"""How long ranks other than 0 hold back a user error: usually every rank meets it, and one report is enough."""
