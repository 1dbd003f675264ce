"""How the process uses a CPU: kept pages, no denormals, as many threads as there are cores to run them."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Parameters of glibc's mallopt and the largest value it takes (its argument is an int).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


@contextmanager
def cpu_setup() -> Iterator[list[str]]:
    """Set this process up to compute on the CPU, before its first parallel work; the value says what was done.

    - malloc keeps freed pages: a step allocates the same hundreds of megabytes again and again, and glibc otherwise
      returns them to the system and takes fresh, zeroed pages every time. Nothing to do without glibc.
    - Denormal numbers are zero until the context ends: the attenuation of the highest octaves is full of them, and
      arithmetic on them is many times slower. Threads inherit this when they start, hence "before".
    - No more threads than cores that this process may use, unless OMP_NUM_THREADS says otherwise.

    Example:
        >>> with cpu_setup() as notes:
        ...     print(notes[-1])  # doctest: +ELLIPSIS
        threads of torch: ...
    """
    notes = []
    if _keep_pages():
        notes.append("malloc keeps its pages (mallopt M_MMAP_THRESHOLD and M_TRIM_THRESHOLD)")
    flushed_before = _flushes_denormals()
    if torch.set_flush_denormal(True):
        notes.append("denormal numbers are flushed to zero")
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() != usable_cores():
        torch.set_num_threads(usable_cores())
    notes.append(f"threads of torch: {torch.get_num_threads()}")
    try:
        yield notes
    finally:
        torch.set_flush_denormal(flushed_before)


def _flushes_denormals() -> bool:
    return float(torch.tensor(1e-38) * 0.1) == 0.0


def _keep_pages() -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(parameter, _NEVER) == 1 for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    )


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity mask, limited by the quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup of version 2: the mask alone
    return cores


def free_memory(device: torch.device) -> int:
    """Bytes that a computation on the device may take now, as the driver or the system reports them.

    On a GPU, what torch's allocator has taken but does not use is free too.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass  # not Linux
    return 4 * 2**30
