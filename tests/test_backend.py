"""The choice of backend: context before environment before configuration."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mipnerf_fast import backend, use_backend


def test_context_goes_before_configuration_and_is_restored() -> None:
    before = backend.current_backend()
    with use_backend("reference"):
        assert backend.current_backend() == "reference"
        with use_backend("native"):
            assert backend.current_backend() == "native"
        assert backend.current_backend() == "reference"
    assert backend.current_backend() == before


def test_restored_after_an_error() -> None:
    before = backend.current_backend()
    with pytest.raises(RuntimeError), use_backend("reference"):
        raise RuntimeError
    assert backend.current_backend() == before


def run(code: str, value: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MIPNERF_FAST_BACKEND": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_environment_goes_between() -> None:
    code = (
        "from mipnerf_fast import backend\n"
        "backend.configure_backend('native')\n"
        "print(backend.current_backend())\n"
        "with backend.use_backend('auto'): print(backend.current_backend())\n"
    )
    assert run(code, "reference").stdout.split() == ["reference", "auto"]
    assert run(code, "").stdout.split() == ["native", "auto"]


def test_unknown_names_are_refused() -> None:
    with (
        pytest.raises(ValueError, match="'cuda', expected one of auto, native, reference"),
        use_backend("cuda"),
    ):
        pass
    result = run("import mipnerf_fast", "fast")
    assert result.returncode != 0 and "MIPNERF_FAST_BACKEND: unknown backend 'fast'" in result.stderr
