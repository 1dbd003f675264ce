"""Write the README's tables from the result files, so that no figure in it is typed by hand.

Every block between `<!-- results: NAME -->` and `<!-- end -->` in README.md is replaced by
benchmarks/results/NAME.md. With --check nothing is written and a difference is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(
    r"(?P<begin><!-- results: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL
)


def filled(text: str, results: Path) -> str:
    """The text with every block replaced by its result file.

    Errors: FileNotFoundError naming the block whose file is missing.
    """

    def body(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.md"
        if not path.is_file():
            raise FileNotFoundError(
                f"README.md: the block {match['name']!r} has no file {path.name} in {results.name}"
            )
        return f"{match['begin']}{path.read_text(encoding='utf-8').strip()}\n{match['end']}"

    return _BLOCK.sub(body, text)


def main() -> int:
    """Fill README.md, or with --check say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where README.md is out of date"
    )
    options = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    try:
        after = filled(before, ROOT / "benchmarks" / "results")
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    if options.check:
        if after != before:
            print(
                "README.md: a table differs from benchmarks/results; run python benchmarks/readme.py",
                file=sys.stderr,
            )
        return int(after != before)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
