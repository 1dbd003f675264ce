"""`make gpu-check` as far as a machine without a GPU can tell: stages, limits, results, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import write_scene
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_mlp, bench_train, gpu_check, gpu_processes
from benchmarks.cuda_check import load_setup
from benchmarks.gpu_check import (
    FAILED,
    NOT_RUN,
    OUT_OF_TIME,
    PASSED,
    Command,
    Stage,
    architecture_of,
    choose_stages,
    folder_name,
    journal_result,
    kernel_benchmarks,
    make_stages,
    run_command,
    run_stage,
    sanitizer_fault,
)
from mipnerf_fast import environment
from mipnerf_fast.ops import mlp_fused

ROOT = Path(gpu_check.__file__).resolve().parents[1]
FACTS = {"gpu": "NVIDIA A", "revision": "abc"}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def python(name: str, code: str, seconds: float = 60, **options: Any) -> Command:
    return Command(name, [sys.executable, "-c", code], seconds, **options)


def stage(*commands: Command, needs: tuple[str, ...] = ()) -> Stage:
    return Stage("part", "a part", needs, lambda: list(commands))


def content(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "part.json").read_text())
    return result


def test_the_stages_and_their_order() -> None:
    stages = make_stages(Path("x"), "9.0a")
    names = [s.name for s in stages]
    assert names == ["build", "tests", "sanitizer", "verify", "kernels", "steps", "training", "profile"]
    # A file each: what a folder may hold.
    assert len(names) <= 8
    assert [s.name for s in choose_stages(stages, "")] == names
    assert [s.name for s in choose_stages(stages, "steps, verify")] == ["verify", "steps"]
    with pytest.raises(
        ValueError, match="STAGE=verfy: there is no such stage, expected some of build, tests"
    ):
        choose_stages(stages, "verfy")
    assert gpu_check.STAGE_SECONDS <= 9 * 60
    for one in stages:
        commands = one.commands()
        assert commands
        # Every command can end before the stage's time does.
        assert sum(command.seconds for command in commands) <= gpu_check.STAGE_SECONDS + 60
        for command in commands:
            for argument in command.argv[1:]:
                if argument.endswith(".py"):
                    assert (ROOT / argument).is_file()
                assert "pip" not in argument and "install" not in argument
    (build,) = (s for s in stages if s.name == "build")
    assert build.commands()[0].environment == {"TORCH_CUDA_ARCH_LIST": "9.0a"}


def commands_of(name: str, scratch: Path = Path("x")) -> list[Command]:
    (found,) = (s for s in make_stages(scratch, "9.0a") if s.name == name)
    return found.commands()


def test_max_autotune_rows_are_of_4096_rays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_train._AUTOTUNED_RAYS == 4096
    render = next(c for c in commands_of("training") if "benchmarks/bench_render.py" in c.argv)
    assert "--no-compile" in render.argv
    made = []

    def case(device: Any, shape: Any, rays: int, mode: str, name: str, compiled: bool = True) -> None:
        made.append((rays, mode, compiled))

    monkeypatch.setattr(bench_mlp, "case", case)
    bench_mlp.cases(torch.device("cuda"))
    assert {rays for rays, _, _ in made} == {2**e // 128 for e in (14, 17, 18, 19, 20)}
    assert {(rays, mode) for rays, mode, compiled in made if compiled} == {
        (4096, "inference"),
        (4096, "forward + backward"),
    }
    # The rows that take minutes come when all others are written, and their benchmark has more time than any other.
    first = min(k for k, (_, _, compiled) in enumerate(made) if compiled)
    assert all(rays == 4096 for rays, _, _ in made[first:])
    *others, network = commands_of("kernels")
    assert network.name == "mlp"
    assert network.seconds > 3 * max(command.seconds for command in others)


def test_the_steps_are_of_all_batches() -> None:
    sizes = {size for command in commands_of("steps") for size in command.argv if size.startswith("paper:")}
    assert sizes == {f"{name}:{rays}" for name, rays in bench_train.sizes_of(torch.device("cuda"))}
    assert sizes == {"paper:1024", "paper:4096", "paper:16384"}
    # What is left of the stage is for the rows of torch.compile.
    assert "paper:4096" in commands_of("steps")[-1].argv


# Part of every one that draws random numbers.
_MEASURED_WITHIN = {"counter_words"}


def test_every_operation_with_cuda_sources_is_measured() -> None:
    measured = {path.stem.removeprefix("bench_") for path in kernel_benchmarks()}
    operations = {path.stem.removesuffix("_cuda") for path in (ROOT / "csrc").glob("*/*_cuda.cu")}
    assert len(operations) > 10
    assert operations - measured == _MEASURED_WITHIN
    assert measured <= operations
    assert [command.name for command in commands_of("kernels")].count("mlp") == 1
    assert {command.name for command in commands_of("kernels")} == measured


def test_the_sanitizer_watches_our_kernels_alone() -> None:
    for command in commands_of("sanitizer"):
        assert command.argv[3:5] == ["--kernel-name", f"kernel_substring={gpu_check.NAMESPACE}"]
    checked = json.loads((ROOT / "benchmarks" / "results" / "cuda_check.json").read_text())["kernels"]
    assert len(checked) > 500
    assert all(gpu_check.NAMESPACE in kernel["symbol"] for kernel in checked)


def test_the_fast_model_is_trained_timed_and_profiled(tmp_path: Path) -> None:
    stages = {s.name: s.commands() for s in make_stages(tmp_path, "9.0a", scene="/scenes/lego")}
    (fast,) = (c for c in stages["training"] if "benchmarks/bench_fast_quality.py" in c.argv)
    after = {flag: fast.argv[fast.argv.index(flag) + 1] for flag in ("--device", "--data", "--only")}
    assert after == {"--device": "cuda", "--data": "/scenes/lego", "--only": "minute"}
    assert fast.argv[-2:] == ["minute", "speed"] and fast.needs == ("tyro",)
    assert [command.name for command in stages["profile"]] == ["paper", "fast-gpu"]
    # What the minute left is kept, even where the time was over before the speed was measured.
    assert fast.collect is not None
    with pytest.raises(FileNotFoundError):
        fast.collect()
    (tmp_path / "fast_minute_cuda.json").write_text('{"mean": 1}')
    assert fast.collect() == {"minute": {"mean": 1}, "tables": []}
    (tmp_path / "fast_speed_cuda.json").write_text('{"view": 2}')
    (tmp_path / "fast_targets_cuda.md").write_text("| a |")
    assert fast.collect() == {"minute": {"mean": 1}, "speed": {"view": 2}, "tables": ["| a |"]}
    (training,) = (s for s in make_stages(tmp_path, "9.0a") if s.name == "training")
    assert any(argument == "demo" for command in training.commands() for argument in command.argv)


def test_a_scene_that_is_missing_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_check.main(["--scene", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert f"SCENE={tmp_path / 'none'}: there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tests", "verify", "kernels", "steps", "training", "profile"])
def test_a_command_cannot_leave_another_s_results(name: str, tmp_path: Path) -> None:
    for command in commands_of(name, tmp_path):
        assert (command.collect is None) == (not command.leaves)
        for file in command.leaves:
            assert file.is_relative_to(tmp_path)
            file.parent.mkdir(exist_ok=True)
            file.write_text('{"of": "the command before"}')
        ends = dataclasses.replace(command, argv=[sys.executable, "-c", "raise SystemExit(3)"])
        outcome = run_command(ends)
        assert (outcome.state, outcome.result) == (FAILED, None)


def test_results_are_written_after_every_command(tmp_path: Path) -> None:
    early = tmp_path / "part.json"
    code = (
        f"import json; d = json.load(open({str(early)!r})); assert d['commands'][0]['result'] == {{'n': 1}}"
    )
    found = tmp_path / "found.json"
    write = f"open({str(found)!r}, 'w').write('{{\"n\": 1}}')"
    first = python("first", write, collect=lambda: json.loads(found.read_text()))
    third = python("third", "print('so'); raise SystemExit(4)")
    state = run_stage(stage(first, python("second", code), third), tmp_path, FACTS)
    data = content(tmp_path)
    assert state == data["state"] == FAILED
    assert [command["state"] for command in data["commands"]] == [PASSED, PASSED, FAILED]
    assert data["commands"][2]["note"] == "exit status 4"
    assert data["commands"][2]["tail"] == "so\n"
    assert data["environment"] == FACTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "part.json"]


def test_a_command_ends_with_its_time_and_takes_its_children_along(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(alive)!r}).touch()"
    begin = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    code = f"import subprocess, sys, time; {begin}; print('begun', flush=True); time.sleep(60)"
    start = time.monotonic()
    outcome = run_command(python("long", code, seconds=1.5))
    assert outcome.state == OUT_OF_TIME
    assert outcome.tail == "begun\n"
    assert time.monotonic() - start < 30
    time.sleep(3)
    assert not alive.exists()


def test_time_that_is_left_is_passed_on(tmp_path: Path) -> None:
    """The quick one leaves its share to the slow one, which has too little of its own; nobody takes more than that."""
    commands = [python("quick", "pass", 20), python("slow", "import time; time.sleep(3)", 1)]
    commands += [python("long", "import time; time.sleep(60)", -15)]
    assert run_stage(stage(*commands), tmp_path, FACTS, seconds=60) == OUT_OF_TIME
    assert [command["state"] for command in content(tmp_path)["commands"]] == [PASSED, PASSED, OUT_OF_TIME]


TOLD = """
import signal, sys, time
def end(*_):
    open({file!r}, "w").write('{{"n": 2}}')
    sys.exit({status})
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("status", "state"), [(0, PASSED), (1, OUT_OF_TIME)])
def test_a_command_is_told_that_its_time_is_over(tmp_path: Path, status: int, state: str) -> None:
    file = tmp_path / "found.json"
    code = TOLD.format(file=str(file), status=status)
    outcome = run_command(python("told", code, 10, collect=lambda: json.loads(file.read_text())), notice=7)
    assert outcome.tail == "ready\n"
    assert (outcome.state, outcome.result) == (state, {"n": 2})
    assert outcome.note.endswith("s, its time")


def test_one_that_does_not_listen_is_ended() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    outcome = run_command(python("deaf", code, 6), notice=3)
    assert outcome.state == OUT_OF_TIME
    assert outcome.seconds < 30


def test_a_stage_has_an_end(tmp_path: Path) -> None:
    commands = [python(name, "import time; time.sleep(60)") for name in ("long", "later")]
    assert run_stage(stage(*commands), tmp_path, FACTS, seconds=1.5) == OUT_OF_TIME
    long, later = content(tmp_path)["commands"]
    assert (long["state"], later["state"]) == (OUT_OF_TIME, NOT_RUN)
    assert later["note"] == "the commands before it took the stage's time"


def test_a_result_that_is_missing_is_a_failure(tmp_path: Path) -> None:
    lost = python("lost", "pass", collect=lambda: json.loads((tmp_path / "no.json").read_text()))
    assert run_stage(stage(lost), tmp_path, FACTS) == FAILED
    assert content(tmp_path)["commands"][0]["note"].startswith("left no result")
    absent = Command("absent", [str(tmp_path / "no-program")], 5)
    assert run_stage(stage(absent), tmp_path, FACTS) == NOT_RUN
    assert "No such file" in content(tmp_path)["commands"][0]["note"]


def test_what_is_missing_is_named_before_anything_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    touch = python("touch", f"open({str(ran)!r}, 'w')")
    assert run_stage(stage(touch, needs=("json", "no_such_package")), tmp_path, FACTS) == NOT_RUN
    assert content(tmp_path)["commands"][0]["note"] == "this interpreter lacks no_such_package"
    assert not ran.exists()
    # What one command alone needs keeps no other from running.
    poor = python("poor", "raise SystemExit(1)", needs=("no_such_package",))
    assert run_stage(stage(poor, touch), tmp_path, FACTS) == NOT_RUN
    first, second = content(tmp_path)["commands"]
    assert (first["note"], first["state"]) == ("this interpreter lacks no_such_package", NOT_RUN)
    assert second["state"] == PASSED and ran.exists()


@pytest.mark.parametrize(
    ("status", "output", "fault"),
    [
        (0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", ""),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", ""),
        (1, "========= ERROR SUMMARY: 0 errors\n", "exit status 1"),
        (1, "Traceback", "no summary (exit status 1)"),
        (
            0,
            "========= Invalid __global__ write of size 4 bytes\n"
            "=========     at void mipnerf::resample_kernel<(bool)1>(Args)+0x90\n"
            "========= ERROR SUMMARY: 3 errors\n",
            "3 found, in resample_kernel",
        ),
        (
            0,
            "========= Error: Race reported between Write access at composite_forward_kernel+0x120 in a.cuh:7\n"
            "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n",
            "2 found, in composite_forward_kernel",
        ),
    ],
)
def test_what_the_sanitizer_says(status: int, output: str, fault: str) -> None:
    assert sanitizer_fault(status, output) == fault


SESSION = """
import os, pytest, signal
def test_one(): pass
@pytest.mark.parametrize("x", ["a b", "c::d"])
def test_two(x): assert x == "a b", "not this one"
def test_three(): pytest.skip("no GPU")
@pytest.fixture
def broken(): raise ValueError("no fixture\\nat all")
def test_four(broken): pass
@pytest.fixture
def leaks():
    yield
    raise ValueError("left open")
def test_five(leaks): pass
def test_six(): os.kill(os.getpid(), signal.SIGKILL)
def test_seven(): pass
"""


def test_a_session_that_is_killed_leaves_what_it_knew(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SESSION)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    journal = tmp_path / "tests.jsonl"
    arguments = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.pytest_journal",
    ]
    arguments += [
        f"--journal={journal}",
        f"--rootdir={tmp_path}",
        "-c",
        str(tmp_path / "pytest.ini"),
        str(tmp_path),
    ]
    outcome = run_command(Command("tests", arguments, 60, lambda: journal_result(journal), leaves=(journal,)))
    assert outcome.state == FAILED
    found = outcome.result
    assert found["passed"] == {"test_it.py": ["test_one", "test_two[a b]"]}
    assert found["did not end"] == "test_it.py::test_six"
    assert (found["ran"], found["skipped"]) == (5, 1)
    assert list(found["failed"]) == [f"test_it.py::test_{x}" for x in ("two[c::d]", "four", "five")]
    assert found["failed"]["test_it.py::test_two[c::d]"].startswith("AssertionError: not this one")
    assert found["failed"]["test_it.py::test_four"] == "ValueError: no fixture"
    # Killed within a line.
    whole = journal.read_text()
    journal.write_text(whole[:-5])
    assert journal_result(journal)["passed"] == found["passed"]
    # A file that cannot be imported is a failure, and a session without a test no pass.
    journal.write_text('{"test": "tests/test_b.py", "state": "failed", "why": "ImportError: no"}\n')
    assert journal_result(journal)["failed"] == {"tests/test_b.py": "ImportError: no"}
    journal.write_text('{"test": "a", "state": "begun"}\n{"test": "a", "state": "skipped"}\n')
    with pytest.raises(ValueError, match="no test ran"):
        journal_result(journal)


def test_names_and_architectures() -> None:
    assert folder_name("NVIDIA H200", "1a2b3c-dirty") == "H200-1a2b3c-dirty"
    assert folder_name("NVIDIA GeForce RTX 4090", "a/b c") == "GeForce-RTX-4090-a-b-c"
    assert [architecture_of(x) for x in ((9, 0), (8, 9), (12, 0))] == ["9.0a", "8.9", "12.0"]


@without_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu-check: torch ")
    assert "sees no GPU" in said and "make cuda-check" in said
    assert gpu_check.main(["--stage", "verfy"]) == 2
    assert "STAGE=verfy" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@without_gpu
def test_the_given_interpreter_is_used_as_it_is() -> None:
    """VENV=none: what make would do is to look at the machine and to run the script, nothing else."""
    make = [
        "make",
        "--no-print-directory",
        "VENV=none",
        f"PYTHON={sys.executable}",
        "STAGE=verify",
        f"SCENE={ROOT}",
        "gpu-check",
    ]
    # A make that runs this suite hands its variables down to this one.
    handed_down = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS")
    alone = {name: value for name, value in os.environ.items() if name not in handed_down}
    planned = subprocess.run(
        [*make, "-n"], cwd=ROOT, env=alone, capture_output=True, text=True, check=True
    ).stdout
    assert f"{sys.executable} benchmarks/gpu_check.py --stage 'verify' --scene '{ROOT}'" in planned
    for word in ("-m pip", "pip install", "-m venv", "setup.py", "download"):
        assert word not in planned
    done = subprocess.run(make, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sees no GPU" in done.stderr


class Launched(TorchDispatchMode):
    """The names of the library's operators that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = function._schema.name.partition("::")
        if space == "mipnerf_fast" and not isinstance(function, torch._ops.HigherOrderOperator):
            self.names.add(name)
        return function(*args, **(kwargs or {}))


def test_every_way_to_call_the_fused_network_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def fused(
        features: Any, views: Any, parameters: Any, architecture: Any, dtype: Any, **options: Any
    ) -> Any:
        # What `folded_network` would refuse: layers that are not those of the architecture.
        has_views, layers = views is not None, len(parameters) // 2
        assert layers == architecture.net_depth + 2 + has_views * (1 + architecture.net_depth_condition)
        seen.add((has_views, dtype, options["deterministic"], features.requires_grad))
        some = sum(parameter.sum() for parameter in parameters)
        return features[..., :3] * some, features[..., :1] * some

    monkeypatch.setattr(mlp_fused, "fused_mlp", fused)
    for dtype in ("bf16", "fp16"):
        gpu_processes.touch_fused(torch.device("cpu"), 64, dtype)
    both = (True, False)
    halves = (torch.bfloat16, torch.float16)
    assert seen == set(itertools.product(both, halves, both, both))


def test_what_the_stages_run_in_processes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same code on the CPU, where it is small: that it runs, and leaves what the stages collect."""
    with Launched() as launched:
        assert gpu_processes.touch_kernels("cpu") == 0
    declared = set(re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "library.cpp").read_text()))
    assert len(declared) > 20
    of_gpus = {name for name in declared if name.startswith(("mlp_", "gemm_")) or name.endswith("_captured")}
    # The network's on a CPU; its mlp_layer_backward is for fewer samples.
    of_gpus -= {"mlp_tiles_forward", "mlp_unfold"}
    assert launched.names == declared - of_gpus
    said = capsys.readouterr().out
    assert "ours, network folded fp32, 33 samples, width 64: loss" in said
    assert "ours, network fused bf16: not run: it runs on a GPU" in said
    for name, kinds in (("small", {"launched", "captured"}), ("fast", {"captured"})):
        assert gpu_processes.profile_steps(tmp_path, name, "cpu", steps=1, warm_up=1) == 0
        profile = json.loads((tmp_path / f"profile_{name}.json").read_text())
        assert set(profile) == kinds
        assert profile["captured"]["kernels"][0]["share"] > 0
    scene = write_scene(tmp_path / "small")
    # A second teaches a network little: the status says so, whatever it is.
    status = gpu_processes.train_multiscale(tmp_path, 0.02, "cpu", "demo", str(scene), levels=2)
    training = json.loads((tmp_path / "training.json").read_text())
    assert status == int(not gpu_processes.has_learned(training["evaluation"]["mean"]["psnr"]))
    assert list(training["evaluation"]["scales"]) == ["1", "2"]
    assert training["steps"] > 0 and training["rays_per_second"] > 0


def test_the_revision_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIPNERF_FAST_REVISION", "1234abcd")
    environment.revision.cache_clear()
    try:
        assert environment.revision() == "1234abcd"
        assert load_setup().source_revision() == "1234abcd"
        monkeypatch.setenv("MIPNERF_FAST_REVISION", "")
        environment.revision.cache_clear()
        assert environment.revision() not in ("", "1234abcd")
        assert load_setup().source_revision() != "1234abcd"
    finally:
        environment.revision.cache_clear()
