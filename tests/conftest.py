"""What every test shares: seeds, threads, the devices there are, and the demand for the native library."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# Before torch and matplotlib are imported; what tests start in other processes inherits both. Workers of pytest-xdist
# share the cores: threads of one that spin for the next piece of work would take them from the others.
CORES = max(len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), 1)
threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # a worker's are its parent's
os.environ["OMP_NUM_THREADS"] = str(min(int(threads or CORES), CORES))
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from mipnerf_fast import _native  # noqa: E402
from mipnerf_fast.backend import configure_backend  # noqa: E402

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

torch.set_num_threads(min(torch.get_num_threads(), CORES))
# The same examples in every run, and no verdict that depends on how busy the machine is.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU and, where there is one, the GPU."""
    return torch.device(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small operations of torch's own: on a busy machine its threads wait for each other at every one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def configured_backend() -> Iterator[None]:
    """Every test starts from the backend "auto": a training and the command line configure that of the process."""
    configure_backend("auto")
    yield
    configure_backend("auto")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A suite that skipped the native library fails, whatever its tests said."""
    if not _native.available():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _native.available():
        terminalreporter.write_sep("=", "FAILED: without the native library", red=True)
        terminalreporter.write_line(_native.why_missing())
