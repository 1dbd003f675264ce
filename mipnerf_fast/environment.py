"""Where something was measured: device, versions and the revision of the source."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path

import torch

from . import _native
from .errors import InputError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str = "auto") -> torch.device:
    """The device of this name; "auto": a GPU where torch sees one, else the CPU.

    Errors: InputError for another name, or for "cuda" where torch sees no GPU.
    """
    if name not in DEVICES:
        raise InputError(f"--device: expected one of {', '.join(DEVICES)}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device: cuda was asked for, but torch {torch.__version__} sees no GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@functools.cache
def cpu_name() -> str:
    """The processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The device in words: the GPU, or the processor and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{cpu_name()}, {count} thread{'s' if count > 1 else ''}"


@functools.cache
def revision() -> str:
    """The git revision of this checkout, "-dirty" when changed since; outside a checkout that of the build.

    The environment variable MIPNERF_FAST_REVISION goes before both: a copy of the files without its history is told
    what it is a copy of.
    """
    if given := os.environ.get("MIPNERF_FAST_REVISION", "").strip():
        return given
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        try:
            return subprocess.run(
                ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return str(_native.build_info().get("revision", "unknown"))
