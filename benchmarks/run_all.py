"""Every benchmark, one after the other, into one folder; what is there already is not measured again.

python benchmarks/run_all.py --out FOLDER [--device cpu|cuda] [--again NAME ...] [--scene FOLDER]

Each script writes its results before the next one starts, and FOLDER/run_all.json says which are done, how long they
took and why one failed. An interrupted series goes on where it stopped: only what is not done, or was done at another
revision or on another device, runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mipnerf_fast.durable_files import write_durably
from mipnerf_fast.environment import choose_device, device_name, revision
from mipnerf_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
STATE = "run_all.json"


@dataclass(frozen=True)
class Benchmark:
    """A script and its arguments, beside --device and --out."""

    name: str
    arguments: tuple[str, ...] = ()


def benchmarks(scene: Path | None) -> list[Benchmark]:
    """bench_<name>.py, the quick ones first; those of quality need a scene folder."""
    names = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py"))
    whole = [name for name in ("train", "render") if name in names]
    quality = [name for name in names if "quality" in name]
    kernels = [name for name in names if name not in whole and name not in quality]
    found = [Benchmark(name) for name in (*kernels, *whole)]
    if scene is not None:
        found += [Benchmark(name, ("--data", str(scene))) for name in quality]
    return found


def load_state(folder: Path, facts: dict[str, str]) -> dict[str, Any]:
    """What is done in a folder; nothing of another revision or device counts.

    Errors: InputError where the file is not what this script wrote.
    """
    path = folder / STATE
    if not path.is_file():
        return {"environment": facts, "benchmarks": {}}
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if state["environment"] != facts:
            return {"environment": facts, "benchmarks": {}}
        assert isinstance(state["benchmarks"], dict)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise InputError(f"{path}: not a file of run_all.py; move it away or name another --out") from None
    return state


def run_all(
    chosen: Sequence[Benchmark], folder: Path, device: str, facts: dict[str, str], again: Sequence[str] = ()
) -> dict[str, Any]:
    """Run what is not done, writing the state after each; a failure does not keep the others from running.

    Returns:
        The state: per benchmark "done" or "failed", seconds, and the last line that a failed one printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = load_state(folder, facts)
    done = state["benchmarks"]
    for benchmark in chosen:
        name = benchmark.name
        if done.get(name, {}).get("state") == "done" and name not in again:
            print(f"run_all: {name} is done", flush=True)
            continue
        command = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py")]
        command += ["--device", device, "--out", str(folder), *benchmark.arguments]
        print(f"run_all: {name}", flush=True)
        start = time.monotonic()
        with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
            status = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        lines = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        entry: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
        entry |= {"state": "failed" if status else "done"}
        if status:
            entry["why"] = f"exit status {status}: {lines[-1] if lines else 'it printed nothing'}"
            print(f"run_all: {name} failed: {entry['why']}", file=sys.stderr, flush=True)
        done[name] = entry
        write_durably(folder / STATE, (json.dumps(state, indent=1) + "\n").encode())
    return state


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; 0 where all are done, 1 where one failed, 2 for bad arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of all results")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--scene", type=Path, help="scene folder, for the benchmarks of quality")
    parser.add_argument("--only", nargs="+", default=[], help="names, such as composite train")
    parser.add_argument("--again", nargs="+", default=[], help="names to measure again")
    options = parser.parse_args(argv)
    try:
        device = choose_device(options.device)
        chosen = benchmarks(options.scene)
        known = [benchmark.name for benchmark in chosen]
        if unknown := [name for name in (*options.only, *options.again) if name not in known]:
            raise InputError(f"no benchmark {unknown[0]!r} here, expected some of {', '.join(known)}")
        if options.only:
            chosen = [benchmark for benchmark in chosen if benchmark.name in options.only]
        facts = {"device": device_name(device), "torch": torch.__version__, "revision": revision()}
        state = run_all(chosen, options.out, device.type, facts, options.again)
    except (InputError, OSError) as error:
        print(f"run_all: {error}", file=sys.stderr)
        return 2
    return int(any(state["benchmarks"][b.name]["state"] != "done" for b in chosen))


if __name__ == "__main__":
    sys.exit(main())
