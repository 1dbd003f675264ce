"""The error that a user's input causes."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: one sentence naming the file, field or argument, what was found and what was expected."""
