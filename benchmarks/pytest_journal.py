"""A plug-in of pytest that writes what becomes of every test as soon as it is known: one line of JSON each.

python -m pytest -p benchmarks.pytest_journal --journal=FILE

A session that is killed, or that a crashing kernel ends, so leaves which tests passed and which one was running. Lines:
{"test": its id, "state": "begun", "passed", "failed", "skipped" or "ended", "why": of a failure, in one line}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import pytest

_WHY = 300


class Journal:
    """The file, and the hooks that write it."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def _write(self, test: str, state: str, why: str = "") -> None:
        self.file.write(json.dumps({"test": test, "state": state} | ({"why": why} if why else {})) + "\n")
        self.file.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, "begun")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write(nodeid, "ended")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", _reason(report))
        elif report.skipped or report.when == "call":
            self._write(report.nodeid, report.outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", _reason(report))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The line that says why it failed."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Of an assertion the first line says it, of a text with a traceback the last.
    return (lines[0 if crash is not None else -1] if lines else "no message")[:_WHY]


def pytest_addoption(parser: pytest.Parser) -> None:
    """--journal."""
    parser.addoption("--journal", type=Path, help="file for what becomes of every test, a line of JSON each")


def pytest_configure(config: pytest.Config) -> None:
    """Open the file."""
    path = config.getoption("--journal")
    if path is not None:
        journal = Journal(path.open("w", encoding="utf-8"))
        config.pluginmanager.register(journal)
        config.add_cleanup(journal.file.close)
