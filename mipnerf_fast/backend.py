"""Which implementation runs: the plain-PyTorch reference or the native kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("auto", "native", "reference")
_ENVIRONMENT = "MIPNERF_FAST_BACKEND"

# Module globals and not ContextVars: torch.compile(fullgraph=True) can read them.
_from_context: str | None = None
_from_configuration: str = "auto"


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_environment_value: str | None = os.environ.get(_ENVIRONMENT) or None
_from_environment: str | None = _check(_environment_value, _ENVIRONMENT) if _environment_value else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context run every stage on the named backend.

    "reference" runs plain PyTorch for every stage, the MLP included; "native" runs the kernel wherever one is
    implemented and raises where the library is missing or a dtype or device is unsupported; "auto" takes the
    native kernel where one serves the device and dtype, and the reference otherwise.

    The context goes before the environment variable MIPNERF_FAST_BACKEND, that before the configuration.

    Errors: ValueError for any other name.

    Example:
        >>> with use_backend("reference"):
        ...     levels = model(rays)
    """
    global _from_context
    _check(name, "use_backend")
    previous, _from_context = _from_context, name
    try:
        yield
    finally:
        _from_context = previous


def configure_backend(name: str) -> None:
    """Set the backend that a configuration asks for; the context and the environment go before it."""
    global _from_configuration
    _from_configuration = _check(name, "backend")


def current_backend() -> str:
    """The backend in force: "auto", "native" or "reference"."""
    if _from_context is not None:
        return _from_context
    if _from_environment is not None:
        return _from_environment
    return _from_configuration
