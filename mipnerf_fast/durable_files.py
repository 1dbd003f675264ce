"""Files that survive a crash whole: written beside their name, flushed to disk, then renamed into place."""

from __future__ import annotations

import os
from pathlib import Path

_PARTIAL = ".partial"


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that is there in full or not at all, whenever the process or the machine stops.

    A file that was there before stays until the new one is complete and on disk. The folder must exist.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed process left of `write_durably` in a folder."""
    for partial in folder.glob(f".*{_PARTIAL}"):
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put the renaming itself on disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
