"""`python train.py ...` is `mipnerf-fast train ...`."""

from __future__ import annotations

import sys

from mipnerf_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
