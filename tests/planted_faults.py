"""Copies of the kernels' sources with faults built in, each behind its number: that a test can fail."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cuda_emulation import harness

_BEGIN = "const emulation::Program program(argc, argv);"


def planted(name: str, program: str, home: str, faults: Iterable[tuple[str, str, str]]) -> Path:
    """A program of the emulation over such a copy; its scalar `fault` says which of them is there, 0: none.

    Args:
        name: of the program, and of the folder in the cache that it and the sources are written to.
        program: its text; it includes what it includes of csrc, but for common, from the copy.
        home: header of csrc that all faults are in or that those files include.
        faults: file of csrc, what stands there once, what is put in its place, in which `fault` is 1 or 0.
    """
    csrc, folder = harness.ROOT / "csrc", harness.CACHE / name
    headers = [path for path in csrc.glob("*/*.*h") if path.parent.name != "common"]
    sources = {str(path.relative_to(csrc)): path.read_text() for path in headers}
    for number, (file, sound, faulty) in enumerate(faults, 1):
        count = sources[file].count(sound)
        assert count == 1, f"{sound!r} stands {count} times in {file}"
        sources[file] = sources[file].replace(sound, faulty.replace("fault", f"(planted_fault == {number})"))
    sources[home] = sources[home].replace(
        "namespace mipnerf {", "namespace mipnerf {\ninline int planted_fault = 0;", 1
    )
    assert program.count(_BEGIN) == 1
    line = 'planted_fault = static_cast<int>(program.integer("fault"));'
    sources[f"emulate_{name}.cpp"] = program.replace(_BEGIN, f"{_BEGIN}\n    {line}")
    for file, text in sources.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    common = folder / "common"
    if common.resolve() != csrc / "common":  # a cache that was copied points to another tree
        common.unlink(missing_ok=True)
        common.symlink_to(csrc / "common")
    return folder / f"emulate_{name}.cpp"
