"""The README: its tables are those of the result files, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.readme import filled

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_result_files() -> None:
    assert filled(README, ROOT / "benchmarks" / "results") == README


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", README) + re.findall(r'src="([^"]+)"', README)
    local = [target for target in targets if "://" not in target]
    assert local
    for target in local:
        assert (ROOT / target).exists(), target


def test_a_block_is_replaced_and_a_missing_file_named(tmp_path: Path) -> None:
    text = "a\n<!-- results: speed -->\nold\n<!-- end -->\nb\n"
    with pytest.raises(FileNotFoundError, match=r"'speed' has no file speed.md"):
        filled(text, tmp_path)
    (tmp_path / "speed.md").write_text("| new |\n")
    assert filled(text, tmp_path) == "a\n<!-- results: speed -->\n| new |\n<!-- end -->\nb\n"
