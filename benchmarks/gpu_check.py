"""Everything that only a GPU can show, in stages: `make gpu-check [STAGE="verify steps"] [SCENE=lego] [VENV=none]`.

Stages, in this order: build (the library, for this GPU alone), tests (all that run on CUDA), sanitizer (memcheck and
racecheck over every kernel), verify (every operation against float64), kernels (their benchmarks, the fast model's
captured step among them), steps (a training step beside PyTorch's), training (the paper's network on multi-scale data,
evaluated, and its rendered frame; the fast model for a minute on four scales, evaluated, its captured step's rate and
its frame, beside what they should be), profile (where a step's time goes, of both models).

The fast model trains on the scene folder that SCENE names, else on the built-in scene, whose views are 200 x 200: what
it should reach is said of lego at 800 x 800.

Each stage is bounded to nine minutes and writes what it found to FOLDER/STAGE.json after every one of its commands,
before the next begins; also what a command had found when its time was over. A stage that fails or runs out of time
does not keep the others from running. FOLDER is named after the GPU and the revision (from git, or
MIPNERF_FAST_REVISION where there is no checkout). Nothing is installed or downloaded: what a stage needs and does not
find is named, and the stage left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
BUILT_IN = "demo"  # in place of a scene folder
STAGE_SECONDS = 540.0
# The end of what a command printed is kept, so many characters of it.
_TAIL = 6000
# A command is told so many seconds before its time is over.
_NOTICE = 15.0
# Of the stage of kernels, for the network's benchmark.
_NETWORK_SECONDS = 240.0
PASSED, FAILED, OUT_OF_TIME, NOT_RUN = "passed", "failed", "out of time", "not run"
# What the package imports when it is used from Python; its command line needs tyro besides.
_PACKAGE = ("torch", "numpy", "imageio", "PIL", "safetensors", "tqdm", "matplotlib", "tensorboard")
# Of all kernels, in their mangled names.
NAMESPACE = "7mipnerf"
# Names of kernels in what compute-sanitizer reports.
_IN_KERNEL = re.compile(r"(?:at|in) (?:.*?\+0x[0-9a-f]+ in )?(?:void )?(?:mipnerf::)?([\w:]+_kernel)\b")


@dataclass
class Command:
    """One process of a stage.

    name: in the results. argv: what to run. seconds: its share of the stage's time; what it does not need the ones
    after it may use. collect: reads what it left behind, after it ended, in whatever way; the result goes into the
    stage's file. leaves: the files that collect reads, removed before the command so that none is another's.
    judge: from exit status and output to a fault, or "". needs: packages beside the stage's.
    """

    name: str
    argv: list[str]
    seconds: float
    collect: Callable[[], Any] | None = None
    judge: Callable[[int, str], str] = lambda status, output: f"exit status {status}" if status else ""
    environment: dict[str, str] = field(default_factory=dict)
    leaves: tuple[Path, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of a command."""

    name: str
    state: str
    seconds: float = 0.0
    note: str = ""
    result: Any = None
    tail: str = ""


@dataclass(frozen=True)
class Stage:
    """A part of the check. needs: packages that its commands import; commands: made when the stage begins."""

    name: str
    what: str
    needs: tuple[str, ...]
    commands: Callable[[], list[Command]]


# ---------------------------------------------------------------------------------------------------- running


def run_command(command: Command, notice: float = _NOTICE) -> Outcome:
    """Run a command for at most its time; what it started ends with it.

    So many seconds before the end it is told by SIGTERM. One that then ends with status 0 says that it has done all it
    must, and left out what may be missing: it has passed.
    """
    start = time.monotonic()
    for file in command.leaves:
        file.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **command.environment}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command.argv,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(command.name, NOT_RUN, note=f"{command.argv[0]}: {error.strerror or error}")
        told = False
        try:
            status = _wait(process, command.seconds - min(notice, 0.2 * command.seconds))
            if status is None:
                told = True
                process.terminate()
                status = _wait(process, command.seconds - (time.monotonic() - start))
        finally:
            _end(process)
        log.seek(0)
        output = log.read()
    outcome = Outcome(command.name, PASSED, round(time.monotonic() - start, 1), tail=output[-_TAIL:])
    if told:
        outcome.note = f"ended after {outcome.seconds:.0f} s, its time"
    if status is None or (told and status):
        outcome.state = OUT_OF_TIME
    elif fault := command.judge(status, output):
        outcome.state, outcome.note = FAILED, fault
    if command.collect is not None:
        try:
            outcome.result = command.collect()
        except (OSError, ValueError, KeyError) as error:
            if outcome.state == PASSED:
                outcome.state, outcome.note = FAILED, f"left no result: {error}"
    return outcome


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit status; None where it takes longer."""
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started: the session is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def missing_packages(names: Sequence[str]) -> list[str]:
    """Those that this interpreter cannot import."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def run_stage(stage: Stage, folder: Path, facts: dict[str, Any], seconds: float = STAGE_SECONDS) -> str:
    """Run a stage's commands within the time left to it, writing folder/STAGE.json after each.

    Returns:
        Its state: that of the worst of its commands.
    """
    outcomes: list[Outcome] = []

    def write() -> str:
        state = worst([outcome.state for outcome in outcomes])
        content: dict[str, Any] = {
            "stage": stage.name,
            "what": stage.what,
            "state": state,
            "environment": facts,
        }
        content["commands"] = [asdict(outcome) for outcome in outcomes]
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{stage.name}.json.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(folder / f"{stage.name}.json")
        return state

    print(f"\n== {stage.name}: {stage.what}", flush=True)
    if lacking := missing_packages(stage.needs):
        outcomes.append(Outcome("imports", NOT_RUN, note=f"this interpreter lacks {', '.join(lacking)}"))
        print(f"   not run: {outcomes[-1].note}", flush=True)
        return write()
    begin = time.monotonic()
    due = 0.0
    for command in stage.commands():
        due += command.seconds
        left = min(due, seconds) - (time.monotonic() - begin)
        if left < 1:
            note = "the commands before it took the stage's time"
            outcomes.append(Outcome(command.name, NOT_RUN, note=note))
        elif lacking := missing_packages(command.needs):
            note = f"this interpreter lacks {', '.join(lacking)}"
            outcomes.append(Outcome(command.name, NOT_RUN, note=note))
        else:
            outcomes.append(run_command(dataclasses.replace(command, seconds=left)))
        last = outcomes[-1]
        print(f"   {last.name}: {last.state} in {last.seconds:.0f} s {last.note}", flush=True)
        if last.state in (FAILED, OUT_OF_TIME):
            print("\n".join(f"   | {line}" for line in last.tail.splitlines()[-15:]), flush=True)
        write()
    return write()


def worst(states: Sequence[str]) -> str:
    """The one that decides about a stage."""
    for state in (FAILED, OUT_OF_TIME, NOT_RUN):
        if state in states:
            return state
    return PASSED if states else NOT_RUN


# ------------------------------------------------------------------------------------------------- the stages


def architecture_of(capability: tuple[int, int]) -> str:
    """As TORCH_CUDA_ARCH_LIST has it; Hopper's own instructions need the "a"."""
    return f"{capability[0]}.{capability[1]}{'a' if capability == (9, 0) else ''}"


def sanitizer_fault(status: int, output: str) -> str:
    """What compute-sanitizer found: errors or hazards, in which kernels."""
    summary = re.search(
        r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output.replace("\n", " ")
    )
    if summary is None:
        return f"no summary (exit status {status})"
    found = int(summary[1] or summary[2])
    if not found and status:
        return f"exit status {status}"
    if not found:
        return ""
    kernels = sorted(set(_IN_KERNEL.findall(output)))
    return f"{found} found, in {', '.join(kernels) or 'kernels that the output does not name'}"


def journal_result(journal: Path) -> dict[str, Any]:
    """What pytest_journal.py wrote: counts, which tests passed, by file, which failed and why, which did not end.

    Errors: ValueError where no test ran: that is no pass.
    """
    passed: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    skipped: set[str] = set()
    begun = ""
    for line in journal.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # killed while it was written
        entry = json.loads(line)
        test, state = entry["test"], entry["state"]
        begun = test if state == "begun" else "" if state == "ended" else begun
        if state == "failed":
            failed.setdefault(test, entry["why"])
        elif state == "skipped":
            skipped.add(test)
        elif state == "passed":
            file, _, name = test.partition("::")
            passed.setdefault(file, []).append(name)
    # One that passes, and whose fixtures then fail, has failed.
    for test in failed:
        file, _, name = test.partition("::")
        if name in passed.get(file, []):
            passed[file].remove(name)
    count = sum(map(len, passed.values()))
    if not count and not failed:
        raise ValueError("no test ran")
    found: dict[str, Any] = {"ran": count + len(failed), "skipped": len(skipped), "failed": failed}
    return found | {"did not end": begun, "passed": passed}


def _json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def make_stages(
    scratch: Path, architecture: str, python: str = sys.executable, scene: str = BUILT_IN
) -> list[Stage]:
    """All stages, in order.

    Args:
        scratch: a folder for what commands leave to each other.
        architecture: of this GPU.
        python: the interpreter of all commands.
        scene: what the fast model trains on, a folder or the built-in one.
    """
    script = "benchmarks/gpu_processes.py"

    def step(name: str, seconds: float, *arguments: str, result: str = "", **options: Any) -> Command:
        leaves = (scratch / result,) if result else ()
        collect = functools.partial(_json_of, *leaves) if leaves else None
        return Command(name, [python, *arguments], seconds, collect, leaves=leaves, **options)

    def build() -> list[Command]:
        only_this = {"TORCH_CUDA_ARCH_LIST": architecture}
        loads = "import torch; from mipnerf_fast import _native; print(_native.build_info()); "
        loads += "raise SystemExit(_native.why_missing() or not _native.build_info().get('cuda'))"
        return [
            step("compile", 520, "setup.py", "--quiet", "build_ext", "--inplace", environment=only_this),
            step("load", 60, "-c", loads),
        ]

    def tests() -> list[Command]:
        journal = scratch / "tests.jsonl"
        choice = "cuda and not test_cuda_check and not test_cuda_emulation"
        arguments = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", choice]
        arguments += ["-p", "benchmarks.pytest_journal", f"--journal={journal}"]
        return [Command("pytest on CUDA", arguments, 535, lambda: journal_result(journal), leaves=(journal,))]

    def sanitizer() -> list[Command]:
        tool = shutil.which("compute-sanitizer") or "compute-sanitizer"
        # Of the mangled name: those of cuBLAS and of torch are not ours to judge, and take most of the time.
        ours = ["--kernel-name", f"kernel_substring={NAMESPACE}"]
        touch = [*ours, python, script, "touch-kernels"]
        return [
            Command("memcheck", [tool, "--tool", "memcheck", *touch], 265, judge=sanitizer_fault),
            Command("racecheck", [tool, "--tool", "racecheck", *touch], 265, judge=sanitizer_fault),
        ]

    def verify() -> list[Command]:
        code = (
            "import json, sys; from mipnerf_fast import verification as v; r = v.verify(['cuda']); "
            "print(v.markdown(r)); open(sys.argv[1], 'w').write(json.dumps(v.to_dict(r))); "
            "raise SystemExit(not r.passed)"
        )
        return [step("verify", 535, "-c", code, str(scratch / "verify.json"), result="verify.json")]

    def kernels() -> list[Command]:
        # First the quick ones, whose time is left to those that compile; the network's rows of max-autotune are last.
        scripts = sorted(
            kernel_benchmarks(),
            key=lambda path: (path.stem == "bench_mlp", "torch.compile" in path.read_text(encoding="utf-8")),
        )
        share = (530 - _NETWORK_SECONDS) / max(1, len(scripts) - 1)
        return [
            step(
                path.stem.removeprefix("bench_"),
                _NETWORK_SECONDS if path.stem == "bench_mlp" else share,
                str(path),
                "--device",
                "cuda",
                "--out",
                str(scratch),
                result=f"{path.stem.removeprefix('bench_')}_cuda.json",
            )
            for path in scripts
        ]

    def steps() -> list[Command]:
        # A table each; last the one whose rows of torch.compile take what time there is.
        return [
            step(
                f"{rays} rays",
                seconds,
                "benchmarks/bench_train.py",
                "--device",
                "cuda",
                "--out",
                str(scratch),
                "--seconds",
                timed,
                "--sizes",
                f"paper:{rays}",
                result="train_cuda.json",
            )
            for rays, seconds, timed in ((1024, 90, "2"), (16384, 130, "2"), (4096, 320, "4"))
        ]

    def training() -> list[Command]:
        run = scratch / "run"
        out = ["--device", "cuda", "--out", str(scratch)]
        fast = ["benchmarks/bench_fast_quality.py", *out, "--data", scene, "--runs", str(scratch / "fast")]
        render = ["benchmarks/bench_render.py", *out, "--seconds", "4", "--no-compile", "--run-dir", str(run)]
        return [
            step("train and evaluate", 250, script, "train", str(scratch), result="training.json"),
            Command(
                "the fast model",
                [python, *fast, "--only", "minute", "speed"],
                240,
                lambda: fast_results(scratch),
                needs=("tyro",),
                leaves=fast_files(scratch),
            ),
            step("render", 110, *render, result="render_cuda.json"),
        ]

    def profile() -> list[Command]:
        return [
            step(name, 265, script, "profile", str(scratch), name, result=f"profile_{name}.json")
            for name in ("paper", "fast-gpu")
        ]

    return [
        Stage(
            "build",
            f"the library for {architecture} alone",
            ("torch", "ninja", "pybind11", "setuptools"),
            build,
        ),
        Stage("tests", "all tests that run on CUDA", (*_PACKAGE, "pytest", "hypothesis"), tests),
        Stage("sanitizer", "memcheck and racecheck over every kernel", ("torch", "numpy"), sanitizer),
        Stage("verify", "every operation against the float64 reference", ("torch", "numpy"), verify),
        Stage("kernels", "the benchmark of each operation", ("torch", "numpy"), kernels),
        Stage("steps", "a training step beside PyTorch's", ("torch", "numpy", "safetensors"), steps),
        Stage(
            "training",
            "multi-scale training, evaluation, a rendered frame, of both models",
            _PACKAGE,
            training,
        ),
        Stage("profile", "where the time of a step goes", ("torch", "numpy", "safetensors"), profile),
    ]


def fast_files(folder: Path) -> tuple[Path, ...]:
    """What bench_fast_quality.py leaves: the minute, the speed, two tables."""
    names = ("minute_cuda.json", "speed_cuda.json", "quality_cuda.md", "targets_cuda.md")
    return tuple(folder / f"fast_{name}" for name in names)


def fast_results(folder: Path) -> dict[str, Any]:
    """The minute's evaluation, the speed, and both beside what they should be.

    Errors: OSError where the minute left nothing; the speed may be missing.
    """
    minute, speed, *tables = fast_files(folder)
    found = {"minute": _json_of(minute)}
    if speed.is_file():
        found["speed"] = _json_of(speed)
    return found | {"tables": [table.read_text() for table in tables if table.is_file()]}


def kernel_benchmarks() -> list[Path]:
    """bench_<operation>.py of every operation that has CUDA sources."""
    scripts = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    return [path for path in scripts if list((ROOT / "csrc" / path.stem.removeprefix("bench_")).glob("*.cu"))]


# --------------------------------------------------------------------------------------------------------- main


def gpu_facts() -> tuple[dict[str, Any], tuple[int, int]]:
    """What results depend on, and the GPU's compute capability.

    Errors: RuntimeError, in one sentence, where there is no torch or it sees no GPU.
    """
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError(f"{sys.executable} has no torch; gpu-check uses it as it is and installs nothing")
    import torch

    from mipnerf_fast.environment import revision

    if not torch.cuda.is_available():
        raise RuntimeError(
            f"torch {torch.__version__} of {sys.executable} sees no GPU, and every stage needs one; without a GPU "
            "`make cuda-check` compiles the kernels and `make test` emulates them"
        )
    driver = clocks = ""
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        asked = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        driver, _, clocks = asked.stdout.strip().partition(", ")
    facts = {
        "gpu": torch.cuda.get_device_name(0),
        "driver": driver,
        "clocks, power limit, temperature at the start": clocks,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "revision": revision(),
    }
    return facts, torch.cuda.get_device_capability(0)


def folder_name(gpu: str, revision: str) -> str:
    """NVIDIA H200, 1a2b3c -> H200-1a2b3c."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", gpu.removeprefix("NVIDIA ")).strip("-")
    return f"{words}-{re.sub(r'[^A-Za-z0-9.]+', '-', revision)}"


def choose_stages(stages: Sequence[Stage], wanted: str) -> list[Stage]:
    """Those named, in the order that they run in; all where none is.

    Errors: ValueError naming a stage that there is not.
    """
    names = wanted.replace(",", " ").split()
    known = [stage.name for stage in stages]
    for name in names:
        if name not in known:
            raise ValueError(f"STAGE={name}: there is no such stage, expected some of {', '.join(known)}")
    return [stage for stage in stages if not names or stage.name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 where all passed, 1 where one did not, 2 where none could be run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stage", default="", help="some stages, by default all")
    parser.add_argument(
        "--scene", default=BUILT_IN, help="what the fast model trains on: a Blender scene's folder"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the folder of results is made")
    parser.add_argument("--seconds", type=float, default=STAGE_SECONDS, help="of each stage, at most")
    options = parser.parse_args(argv)
    try:
        # Before anything else, so that a misspelt stage is told even where there is no GPU.
        choose_stages(make_stages(Path(), ""), options.stage)
        if options.scene != BUILT_IN and not Path(options.scene).is_dir():
            raise ValueError(f"SCENE={options.scene}: there is no such folder")
        facts, capability = gpu_facts()
    except (ValueError, RuntimeError) as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    folder = options.out / folder_name(facts["gpu"], facts["revision"])
    states = {}
    with tempfile.TemporaryDirectory() as scratch:
        scene = options.scene if options.scene == BUILT_IN else str(Path(options.scene).resolve())
        stages = make_stages(Path(scratch), architecture_of(capability), scene=scene)
        for stage in choose_stages(stages, options.stage):
            states[stage.name] = run_stage(stage, folder, facts, min(options.seconds, STAGE_SECONDS))
    print(f"\n{facts['gpu']}, revision {facts['revision']}: {folder}")
    for name, state in states.items():
        print(f"  {name:10} {state}")
    return int(any(state != PASSED for state in states.values()))


if __name__ == "__main__":
    sys.exit(main())
