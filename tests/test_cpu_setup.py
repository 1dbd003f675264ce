"""The CPU's set-up: pages are kept, denormals are flushed and come back."""

from __future__ import annotations

import subprocess
import sys

import torch

from mipnerf_fast.cpu_setup import cpu_setup, free_memory, usable_cores


def test_denormals_are_zero_inside_and_come_back() -> None:
    tiny = torch.tensor(1e-38)
    with cpu_setup() as notes:
        flushes = any("denormal" in note for note in notes)
        assert (float(tiny * 0.1) == 0.0) == flushes
    assert float(tiny * 0.1) > 0


def test_freed_pages_are_kept() -> None:
    # In a process of its own: what malloc does depends on all that was allocated before.
    program = """
import resource, sys
import torch
from mipnerf_fast.cpu_setup import cpu_setup

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
with cpu_setup() as notes:
    # The best of five: the heap has to grow once, and the system may take idle pages back at any time.
    after = min(faults() for _ in range(5))
print(before, after, int(any("malloc" in note for note in notes)))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, after, keeps = map(int, out.split())
    # 64 MiB ten times over: fresh pages (at best of 2 MiB each) before, next to none after.
    assert before > 100
    assert after < before / 10 or not keeps


def test_the_machine_is_read() -> None:
    assert usable_cores() >= 1
    assert free_memory(torch.device("cpu")) > 2**20
