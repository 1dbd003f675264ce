"""Emulation programs over copies of the kernels with faults built in, each chosen at run time by its number."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import harness

FAULT = '#include "../fault.h"'
MAIN = "const emulation::Program program(argc, argv);"


def broken_program(program: str, faults: Sequence[tuple[str, str, str]], text: str = "") -> Path:
    """``emulate_<program>.cpp`` over a copy of csrc's headers, with every fault in it; 0 is the sound copy.

    faults: file under csrc, what stands there once, what stands there when broken, where the word ``fault`` is whether
    this is the fault that the program's scalar "fault" names: the first one is number 1. text: of another program than
    that file's.
    """
    csrc, folder = harness.ROOT / "csrc", harness.CACHE / f"broken_{program}"
    headers = [path for path in csrc.glob("*/*.*h") if path.parent.name != "common"]
    sources = {path.relative_to(csrc).as_posix(): path.read_text() for path in headers}
    for number, (file, sound, faulty) in enumerate(faults, 1):
        assert sources[file].count(sound) == 1, (
            f"{sound!r} stands {sources[file].count(sound)} times in {file}"
        )
        sources[file] = sources[file].replace(sound, faulty.replace("fault", f"(built_in_fault == {number})"))
    for file in {file for file, *_ in faults}:
        sources[file] = sources[file].replace("#pragma once", f"#pragma once\n{FAULT}", 1)
    sources["fault.h"] = "#pragma once\ninline int built_in_fault = 0;\n"
    text = text or (harness.HERE / f"emulate_{program}.cpp").read_text()
    assert text.count(MAIN) == 1
    text = text.replace(MAIN, f'{MAIN}\n    built_in_fault = static_cast<int>(program.integer("fault"));')
    for name, source in sources.items():
        _write(folder / name, source)
    common = folder / "common"
    if common.resolve() != csrc / "common":  # a cache that was copied points to another tree
        common.unlink(missing_ok=True)
        common.symlink_to(csrc / "common")
    path = folder / f"emulate_broken_{program}.cpp"
    _write(path, text)
    return path


def _write(path: Path, text: str) -> None:
    """At once, and only where it changes something: another process may be compiling it."""
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(name, path)
