"""Emulation programs over copies of the kernels with faults built in, each chosen at run time by its number."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import harness

FAULT = '#include "fault.h"'
MAIN = "const emulation::Program program(argc, argv);"


def broken_program(program: str, operator: str, faults: Sequence[tuple[str, str, str]]) -> Path:
    """``emulate_<program>.cpp`` over a copy of csrc/<operator>, with every fault in it; 0 is the sound copy.

    faults: file, what stands there once, what stands there when broken, where the word ``fault`` is whether this is
    the fault that the program's scalar "fault" names: the first one is number 1.
    """
    folder = harness.CACHE / f"broken_{program}"
    sources = {path.name: path.read_text() for path in (harness.ROOT / "csrc" / operator).glob("*.*h")}
    for number, (file, sound, faulty) in enumerate(faults, 1):
        assert sources[file].count(sound) == 1, (
            f"{sound!r} stands {sources[file].count(sound)} times in {file}"
        )
        sources[file] = sources[file].replace(sound, faulty.replace("fault", f"(built_in_fault == {number})"))
    for file in {file for file, *_ in faults}:
        sources[file] = sources[file].replace("#pragma once", f"#pragma once\n{FAULT}", 1)
    sources["fault.h"] = "#pragma once\ninline int built_in_fault = 0;\n"
    text = (harness.HERE / f"emulate_{program}.cpp").read_text()
    assert text.count(MAIN) == 1
    text = text.replace(MAIN, f'{MAIN}\n    built_in_fault = static_cast<int>(program.integer("fault"));')
    for name, source in sources.items():
        _write(folder / operator / name, source)
    for other in (harness.ROOT / "csrc").iterdir():
        if other.is_dir() and other.name != operator and not (folder / other.name).exists():
            (folder / other.name).symlink_to(other)
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
