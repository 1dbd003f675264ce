"""Resuming: N steps equal N/2 steps, a kill at any moment, a resume, and the rest, bit by bit.

What is killed trains on the CPU: these tests are about files and signals, and no device has a part in those.
"""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
import os
import random
import signal
import stat
import sys
import time
import types
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, same_tensors, tiny, write_scene

from mipnerf_fast import InputError, MipNerfConfig, TrainConfig, durable_files, training_reports
from mipnerf_fast.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from mipnerf_fast.trainer import Trainer
from mipnerf_fast.training import run_training

# The run of these tests: density noise, so that every stream of random numbers is in use, and clipping.
CONFIG = tiny(
    max_steps=36,
    save_every=3,
    test_every=6,
    print_every=2,
    grad_max_norm=0.5,
    model=dataclasses.replace(TINY.model, density_noise=0.3),
)
# Children are forked from a server that has imported everything and run nothing: a clean start in no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mipnerf_fast.training", "mipnerf_fast.training_reports"])


def die() -> None:
    """As by kill -9: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def break_files(when: str, number: int) -> None:
    """Be killed at the number-th file that is written durably: before it takes its place, or halfway through it."""
    fsync, replace = os.fsync, os.replace
    count = 0

    def dying_replace(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == number:
            die()
        replace(source, target)

    def dying_fsync(descriptor: int) -> None:
        nonlocal count
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            count += 1
            if count == number:
                os.ftruncate(descriptor, status.st_size // 2)
                die()
        fsync(descriptor)

    # The module's own name for os, so that previews and curves do not count.
    functions = vars(os) | ({"replace": dying_replace} if when == "at-replace" else {"fsync": dying_fsync})
    durable_files.os = types.SimpleNamespace(**functions)  # type: ignore[assignment]


def child(
    log: Path, scene: Path, run_dir: Path, config: TrainConfig, resume: bool, when: str, number: int
) -> None:
    """Train in a process of its own; standard error goes to a file, the exit status is the command's."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.stderr = open(sys.stderr.fileno(), "w", buffering=1)  # noqa: SIM115 (for good)
    torch.set_num_threads(1)
    sys.modules["tensorboard"] = None  # type: ignore[assignment]  # saves a second of import
    training_reports.Reports.curves = lambda *_: None  # type: ignore[method-assign]  # and so does this
    if when:
        break_files(when, number)
    result = run_training(str(scene), config, "tiny", run_dir, device="cpu", resume=resume)
    sys.exit(130 if result.interrupted else 0)


def start(
    scene: Path,
    run_dir: Path,
    resume: bool = False,
    config: TrainConfig = CONFIG,
    when: str = "",
    number: int = 0,
) -> ForkServerProcess:
    log = run_dir.with_suffix(".log")
    process = PROCESSES.Process(target=child, args=(log, scene, run_dir, config, resume, when, number))
    process.start()
    return process


def finish(process: ForkServerProcess, run_dir: Path) -> tuple[int | None, str]:
    process.join(timeout=120)
    log = run_dir.with_suffix(".log")
    return process.exitcode, log.read_text() if log.exists() else "no output"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """This work is too small for more, and children that train beside others must not wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def straight(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    status, errors = finish(start(scene, run_dir), run_dir)
    assert status == 0, errors
    return run_dir


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "rays_per_second")} for row in found]


def assert_same_run(run_dir: Path, straight: Path) -> None:
    """The last checkpoints are equal bit by bit, and so are the rows of the metrics; nothing else is left."""
    a, b = (load_checkpoint(checkpoint_path(run, 36)) for run in (run_dir, straight))
    assert same_tensors(a.tensors, b.tensors)
    assert rows(run_dir) == rows(straight)
    steps = [int(row["step"]) for row in rows(run_dir)]
    assert steps == sorted({*range(2, 37, 2), *range(3, 37, 3)})
    names = [path.name for path in list_checkpoints(run_dir)]
    assert names == [path.name for path in list_checkpoints(straight)]
    assert sorted(os.listdir(run_dir / "checkpoints")) == names
    assert not list(run_dir.glob(".*"))


def straight_on(device: torch.device, scene: Path, straight: Path, folder: Path) -> tuple[TrainConfig, Path]:
    """The run that nothing happened to, on the CPU that of a process of its own, and its configuration.

    On a GPU the sums of a run take another order in the next one, but in the deterministic mode.
    """
    if device.type == "cpu":
        return CONFIG, straight
    config = dataclasses.replace(CONFIG, deterministic=True)
    run_training(str(scene), config, "tiny", folder / "run", device=device.type)
    return config, folder / "run"


@pytest.mark.parametrize("half", [31, 33])
def test_two_halves_equal_the_whole(
    scene: Path, straight: Path, tmp_path: Path, half: int, device: torch.device
) -> None:
    # The schedule is that of all steps in both halves, so the first is ended by a signal and not by max_steps.
    config, straight = straight_on(device, scene, straight, tmp_path / "straight")
    run_dir = tmp_path / "run"
    launch = Trainer.launch_step

    def interrupted(self: Trainer) -> None:
        launch(self)
        if self.step == half:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "launch_step", interrupted)
        result = run_training(str(scene), config, "tiny", run_dir, device=device.type)
    assert (result.step, result.interrupted) == (half, True)
    assert result.checkpoint == checkpoint_path(run_dir, half)
    assert result.checkpoint.is_file()
    result = run_training(str(scene), config, "tiny", run_dir, device=device.type, resume=True)
    assert (result.step, result.interrupted) == (36, False)
    a, b = (load_checkpoint(checkpoint_path(run, 36)) for run in (run_dir, straight))
    assert same_tensors(a.tensors, b.tensors)
    if half % 3 == 0:
        assert_same_run(run_dir, straight)
    else:
        # A checkpoint where the straight run has none has a row of its own; the next one covers the rest.
        assert [row["step"] for row in rows(run_dir) if row not in rows(straight)] == ["31", "32"]


def test_killed_at_random_moments(scene: Path, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    moments = random.Random(20200823)
    kills = 0
    for attempt in range(6):
        seen = list_checkpoints(run_dir)[-1:]
        process = start(scene, run_dir, resume=(run_dir / "config.json").is_file())
        if attempt < 5:
            # The first is killed as it starts. The others get somewhere first, however slow the machine, and are
            # then killed within the time of some steps: forward, backward, saving, whatever they happen to be at.
            while attempt > 0 and process.is_alive() and list_checkpoints(run_dir)[-1:] == seen:
                time.sleep(0.001)
            time.sleep(moments.uniform(0.0, 0.1))
            if process.is_alive():
                process.kill()
                kills += 1
        status, errors = finish(process, run_dir)
        assert status in (0, -signal.SIGKILL), errors
        if status == 0:
            break
    assert status == 0
    assert kills >= 1
    assert_same_run(run_dir, straight)


# Files are written in this order: config.json, metrics.csv, then a checkpoint every 3 steps (in-write counts the
# metrics again, which are put on disk before every checkpoint).
@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("at-replace", 1),
        ("at-replace", 2),
        ("at-replace", 3),
        ("at-replace", 8),
        ("in-write", 4),
        ("in-write", 12),
    ],
)
def test_killed_while_a_file_is_written(
    scene: Path, straight: Path, tmp_path: Path, when: str, number: int
) -> None:
    run_dir = tmp_path / "run"
    status, errors = finish(start(scene, run_dir, when=when, number=number), run_dir)
    assert status == -signal.SIGKILL, errors
    assert list(run_dir.rglob(".*.partial"))
    has_config = (run_dir / "config.json").is_file()
    assert has_config == ((when, number) != ("at-replace", 1))
    # No broken file has taken the place of a good one.
    for path in list_checkpoints(run_dir):
        load_checkpoint(path)
    status, errors = finish(start(scene, run_dir, resume=has_config), run_dir)
    assert status == 0, errors
    assert_same_run(run_dir, straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(scene: Path, tmp_path: Path, number: signal.Signals) -> None:
    run_dir = tmp_path / "run"
    process = start(scene, run_dir, config=dataclasses.replace(CONFIG, max_steps=10**6))
    while not list_checkpoints(run_dir) and process.is_alive():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    status, errors = finish(process, run_dir)
    assert status == 130, errors
    last = list_checkpoints(run_dir)[-1]
    step = load_checkpoint(last).info.step
    assert f"train: interrupted at step {step:,}" in errors
    assert f"saved {last}; go on with --resume --run-dir {run_dir}" in errors
    assert "Traceback" not in errors
    assert rows(run_dir)[-1]["step"] == str(step)


def test_two_threads_resume_exactly_too(scene: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    for name, parts in (("whole", [12]), ("parts", [6, 12])):
        for i, steps in enumerate(parts):
            # Decay over 12 steps in all of them: a constant learning rate needs no schedule.
            config = dataclasses.replace(CONFIG, max_steps=steps, lr_final=CONFIG.lr_init)
            run_training(str(scene), config, "tiny", tmp_path / name, device="cpu", resume=i > 0)
    a, b = (load_checkpoint(checkpoint_path(tmp_path / name, 12)) for name in ("whole", "parts"))
    assert same_tensors(a.tensors, b.tensors)


def test_a_broken_last_checkpoint_costs_only_its_steps(scene: Path, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    status, errors = finish(start(scene, run_dir, when="at-replace", number=8), run_dir)
    assert status == -signal.SIGKILL, errors
    last = list_checkpoints(run_dir)[-1]
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=rf"{last.name}: truncated .*; using step_"):
        run_training(str(scene), CONFIG, "tiny", run_dir, device="cpu", resume=True)
    a, b = (load_checkpoint(checkpoint_path(run, 36)) for run in (run_dir, straight))
    assert same_tensors(a.tensors, b.tensors)
    assert rows(run_dir) == rows(straight)
    assert last.with_suffix(".broken").is_file()


def test_a_finished_run_resumes_to_nothing_or_goes_on(scene: Path, tmp_path: Path) -> None:
    config = tiny(max_steps=8, test_every=0)
    run = tmp_path / "run"
    first = run_training(str(scene), config, "tiny", run, device="cpu")
    again = run_training(str(scene), config, "tiny", run, device="cpu", resume=True)
    assert (again.step, again.seconds, again.checkpoint) == (8, first.seconds, first.checkpoint)
    longer = run_training(
        str(scene), tiny(max_steps=12, test_every=0), "tiny", run, device="cpu", resume=True
    )
    assert longer.step == 12
    assert longer.seconds > first.seconds
    with pytest.raises(InputError, match=r"--max-steps: 8 is less than the 12 steps that the run has done"):
        run_training(str(scene), config, "tiny", run, device="cpu", resume=True)


def test_a_run_is_not_started_over_by_mistake(scene: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(str(scene), tiny(max_steps=4), "tiny", run, device="cpu")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match=r"run already holds a run with checkpoints .*step_00000004.*--resume"
    ):
        run_training(str(scene), tiny(max_steps=4), "tiny", run, device="cpu")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_different_run_is_refused_by_field(scene: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(str(scene), tiny(max_steps=4), "tiny", run, device="cpu")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = write_scene(tmp_path / "other", views=5)
    model = MipNerfConfig(**{**dataclasses.asdict(TINY.model), "net_width": 32})
    refusals = [
        (tiny(seed=7), scene, {}, r"seed: 20200823 in the run folder, 7 now"),
        (tiny(lr_init=1.0), scene, {}, r"lr_init: 0.005 in the run folder, 1.0 now"),
        (tiny(model=model), scene, {}, r"model.net_width: 16 in the run folder, 32 now"),
        (TINY, scene, {"downscale": 2}, r"downscale: 1 in the run folder, 2 now"),
        (TINY, scene, {"background": "black"}, r"background: 'white' in the run folder, 'black' now"),
        (TINY, other, {}, r"dataset: \{'images': 4, .* in the run folder, \{'images': 5"),
    ]
    for config, data, changes, message in refusals:
        with pytest.raises(InputError, match=rf"--resume: a different run: {message}"):
            run_training(str(data), config, "tiny", run, device="cpu", resume=True, **changes)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    # The same scene elsewhere is the same run, and reporting may change.
    moved = scene.rename(scene.with_name("moved"))
    try:
        config = tiny(max_steps=6, save_every=2, print_every=1, test_every=3)
        assert run_training(str(moved), config, "tiny", run, device="cpu", resume=True).step == 6
    finally:
        moved.rename(scene)


def test_a_checkpoint_of_another_run_is_refused(scene: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        run_training(str(scene), tiny(max_steps=4, seed=seed), "tiny", tmp_path / name, device="cpu")
    foreign = checkpoint_path(tmp_path / "a", 4)
    foreign.write_bytes(checkpoint_path(tmp_path / "b", 4).read_bytes())
    with pytest.raises(InputError, match=r"seed: 2 in .*a/checkpoints/step_00000004.safetensors, 1 now"):
        run_training(str(scene), tiny(max_steps=8, seed=1), "tiny", tmp_path / "a", device="cpu", resume=True)
