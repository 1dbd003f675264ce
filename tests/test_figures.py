"""The figures script draws every figure, and none is blank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio

ROOT = Path(__file__).resolve().parents[1]


def test_figures(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/figures.py", "--out", str(tmp_path / "new" / "figures")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    paths = sorted((tmp_path / "new" / "figures").iterdir())
    assert [path.name for path in paths] == ["encodings.png", "frusta.png", "resampling.png"]
    for path in paths:
        assert str(path) in done.stdout
        image = imageio.imread(path)[..., :3]
        assert min(image.shape[:2]) > 400
        # Ink everywhere: no third of the picture, across or down, is a single colour.
        for axis in (0, 1):
            length = image.shape[axis] // 3
            for start in (0, length, 2 * length):
                part = image.take(range(start, start + length), axis)
                assert part.std() > 5, (path.name, axis, start)
