"""The error that a user's input causes."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: one sentence naming the file, field or argument, what was found and what was expected."""


class AgreedError(InputError):
    """A process of a job of several refused its input, and all of them know; the first one says so."""


class PeerLostError(RuntimeError):
    """Another process of the job has ended or cannot be reached."""
