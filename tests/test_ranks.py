"""Several processes that train one model: the same result as one, agreement, a lost process, another number of them.

On CPUs they talk through gloo; where there are two GPUs, the same tests also run through NCCL, which takes one each.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, tiny, tiny_dataset, write_scene
from torch import Tensor

from mipnerf_fast import cli, training_reports
from mipnerf_fast.cameras import Rays
from mipnerf_fast.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from mipnerf_fast.data import load_dataset, multiscale
from mipnerf_fast.errors import AgreedError, InputError
from mipnerf_fast.ranks import ALONE, Ranks, join_ranks
from mipnerf_fast.trainer import _STEPS_AHEAD, Trainer
from mipnerf_fast.training import make_trainer, run_training

ROOT = Path(__file__).resolve().parent.parent
STEPS, HALF = 16, 7
# Steps that several processes do after one of them is asked to stop, until all know.
AHEAD = {"cpu": 0, "cuda": _STEPS_AHEAD - 1}
CONFIG = tiny(
    max_steps=STEPS,
    save_every=STEPS,
    test_every=10,
    grad_max_norm=0.5,
    weight_decay_mult=0.01,
    model=dataclasses.replace(TINY.model, density_noise=0.3),
)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mipnerf_fast.training", "mipnerf_fast.training_reports"])


PLACES = ["cpu", "cuda"] if torch.cuda.device_count() >= 2 else ["cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """This work is too small for more, that of the fixtures of a module too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    """Where the processes train."""
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scales, so that rays weigh 1, 4 and 16."""
    folder = tmp_path_factory.mktemp("ranks")
    write_scene(folder / "scene", size=16)
    return multiscale.convert(folder / "scene", folder / "multi", levels=3, progress=False)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def child(
    rank: int, size: int, port: int, log: Path, work: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    """One process of a job, in the environment that torchrun gives it."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.stderr = open(sys.stderr.fileno(), "w", buffering=1)  # noqa: SIM115 (for good)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    sys.modules["tensorboard"] = None  # type: ignore[assignment]  # saves a second of import
    training_reports.Reports.curves = lambda *_: None  # type: ignore[method-assign]  # and so does this
    sys.exit(work(*arguments))


def job(
    folder: Path, work: Callable[..., int], *arguments: Any, size: int = 2
) -> tuple[list[int | None], list[str]]:
    """Run it in so many processes: their exit statuses and what they said."""
    port = free_port()
    folder.mkdir(exist_ok=True)
    logs = [folder / f"rank{rank}.log" for rank in range(size)]
    processes = [
        PROCESSES.Process(target=child, args=(rank, size, port, logs[rank], work, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
    return [process.exitcode for process in processes], [log.read_text() for log in logs]


def train(scene: Path, run_dir: Path, place: str, interrupted_at: int = 0, resume: bool = False) -> int:
    """A run; the last process, and no other, gets a SIGINT as it launches that step."""
    launch = Trainer.launch_step

    def interrupted(self: Trainer) -> None:
        if self.step + 1 == interrupted_at and self.ranks.rank == self.ranks.size - 1:
            os.kill(os.getpid(), signal.SIGINT)
        launch(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "launch_step", interrupted)
        result = run_training(str(scene), CONFIG, "tiny", run_dir, device=place, resume=resume)
    return 130 if result.interrupted else 0


def parameters_alone(scene: Path, chunk_rays: int, place: str) -> Tensor:
    trainer = Trainer(dataclasses.replace(CONFIG, chunk_rays=chunk_rays), load_dataset(str(scene)), place)
    for _ in range(STEPS):
        trainer.train_step()
    return flattened(trainer.model.state_dict())


def flattened(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].detach().flatten().cpu() for name in sorted(weights)])


def saved_parameters(run_dir: Path) -> Tensor:
    return flattened(load_checkpoint(checkpoint_path(run_dir, STEPS)).weights())


# How far different orders of the same sums are apart after STEPS steps. Each moves the result by about as much in a
# direction of its own; one more order is within twice the largest, or its direction is not one of rounding.
CHUNKS = (16, 21, 32, 50)


@pytest.fixture(scope="module")
def whole(scene: Path, place: str) -> Tensor:
    return parameters_alone(scene, 64, place)


@pytest.fixture(scope="module")
def rounding(scene: Path, whole: Tensor, place: str) -> float:
    found = max(float((parameters_alone(scene, chunk, place) - whole).norm()) for chunk in CHUNKS)
    assert 0 < found < 1e-3 * float(whole.norm())
    return found


@pytest.fixture(scope="module")
def halved(scene: Path, place: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, interrupted halfway by a signal to one of them."""
    folder = tmp_path_factory.mktemp("halved")
    statuses, said = job(folder, train, scene, folder / "run", place, HALF)
    assert statuses == [130, 130], said
    # One process speaks.
    assert "32 for each of 2 processes" in said[0]
    assert f"train: interrupted at step {HALF + AHEAD[place]} " in said[0]
    assert said[1] == ""
    return folder / "run"


def test_two_processes_equal_one(
    scene: Path, tmp_path: Path, whole: Tensor, rounding: float, place: str
) -> None:
    statuses, said = job(tmp_path, train, scene, tmp_path / "run", place)
    assert statuses == [0, 0], said
    difference = float((saved_parameters(tmp_path / "run") - whole).norm())
    assert difference <= 2 * rounding
    # One process wrote everything, and test views were rendered by both.
    assert sorted(path.name for path in (tmp_path / "run" / "previews").iterdir()) == ["step_00000010.png"]
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") == 1 + len([5, 10, 15, 16])


def test_areas_summed_by_each_process_would_be_found(
    scene: Path, whole: Tensor, rounding: float, place: str
) -> None:
    """What two processes would do that normalise by their own area weights, here one after the other."""
    trainer = Trainer(dataclasses.replace(CONFIG, chunk_rays=32), load_dataset(str(scene)), place)
    work, accumulate = trainer.work, trainer.work.accumulate_gradients

    def halves(step: Tensor, rays: Rays, target: Tensor, total: Tensor, rows: Tensor) -> None:
        for part in (slice(0, 32), slice(32, 64)):
            mine = Rays(*(field[part] for field in rays))
            accumulate(step, mine, target[part], 2 * mine.lossmult.sum(), rows[part])

    work.accumulate_gradients = halves  # type: ignore[method-assign, assignment]
    for _ in range(STEPS):
        trainer.train_step()
    found = flattened(trainer.model.state_dict())
    assert float((found - whole).norm()) > 10 * rounding


def test_one_process_resumes_what_two_began(
    scene: Path, halved: Path, whole: Tensor, rounding: float, place: str
) -> None:
    half = HALF + AHEAD[place]
    assert [path.name for path in list_checkpoints(halved)] == [f"step_{half:08d}.safetensors"]
    result = run_training(str(scene), CONFIG, "tiny", halved, device=place, resume=True)
    assert (result.step, result.interrupted) == (STEPS, False)
    assert float((saved_parameters(halved) - whole).norm()) <= 2 * rounding


def test_two_processes_resume_what_one_began(
    scene: Path, tmp_path: Path, whole: Tensor, rounding: float, place: str
) -> None:
    run_dir = tmp_path / "run"
    assert train(scene, run_dir, place, HALF) == 130
    (path,) = list_checkpoints(run_dir)
    info = load_checkpoint(path).info
    # All rays in one pass: each of the two has fewer.
    assert (info.step, info.chunk_rays) == (HALF, 64)
    statuses, said = job(tmp_path / "logs", train, scene, run_dir, place, 0, True)
    assert statuses == [0, 0], said
    assert "32 for each of 2 processes in one pass" in said[0]
    assert f"train: resumed at step {HALF}" in said[0]
    assert load_checkpoint(checkpoint_path(run_dir, STEPS)).info.step == STEPS
    assert float((saved_parameters(run_dir) - whole).norm()) <= 2 * rounding


def train_for_a_while(scene: Path, run_dir: Path, place: str) -> int:
    config = dataclasses.replace(CONFIG, max_steps=10**6, save_every=10**6, test_every=0)
    result = run_training(str(scene), config, "tiny", run_dir, device=place, max_minutes=0.005)
    print(f"\nended at {result.step}, {result.interrupted}", file=sys.stderr)
    return 0


def test_a_time_limit_ends_all_at_the_same_step(scene: Path, tmp_path: Path, place: str) -> None:
    """The clock is the first process's; the others follow it, not their own."""
    statuses, said = job(tmp_path, train_for_a_while, scene, tmp_path / "run", place)
    assert statuses == [0, 0], said
    ends = [text.splitlines()[-1] for text in said]
    assert ends[0] == ends[1]
    (path,) = list_checkpoints(tmp_path / "run")
    info = load_checkpoint(path).info
    assert ends[0] == f"ended at {info.step}, False"
    # The step that sees that the time is up is the last one.
    assert info.seconds >= 0.3
    assert 1 <= info.step < 10**6


def evaluate_together(run_dir: Path, place: str) -> int:
    return cli.main(["eval", "--run-dir", str(run_dir), "--device", place, "--images"])


def test_an_evaluation_is_shared_out_by_images(halved: Path, tmp_path: Path, place: str) -> None:
    statuses, said = job(tmp_path, evaluate_together, halved, place)
    assert statuses == [0, 0], said
    shared = json.loads((halved / "eval" / "metrics.json").read_text())
    pictures = {path.name: path.read_bytes() for path in (halved / "eval" / "images").iterdir()}
    assert len(pictures) == 12
    # The same views from one process, bit by bit: no view is cut.
    assert evaluate_together(halved, place) == 0
    assert json.loads((halved / "eval" / "metrics.json").read_text()) == shared
    assert {path.name: path.read_bytes() for path in (halved / "eval" / "images").iterdir()} == pictures


def refused(scene: Path, run_dir: Path) -> int:
    try:
        run_training(str(scene), CONFIG, "tiny", run_dir, device="cpu")
    except AgreedError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def test_input_that_one_process_refuses_is_refused_by_all(scene: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    statuses, said = job(tmp_path / "logs", refused, scene, tmp_path / "file")
    assert statuses == [2, 2], said
    assert all("file is a file, expected a folder" in text for text in said)


def disagree(place: str) -> int:
    with join_ranks(torch.device(place)) as (ranks, device):

        def load() -> int:
            if ranks.rank == 1:
                raise InputError("no such file")
            return 1

        try:
            ranks.together(load)
        except AgreedError as error:
            print(error, file=sys.stderr)
        assert ranks.gather(10 + ranks.rank) == [10, 11]
        assert ranks.from_first(lambda: ranks.rank) == 0
        assert device.type == place
        total = torch.full((3,), 1.0 + ranks.rank, device=device)
        ranks.sum_(total)
        assert total.tolist() == [3.0] * 3
    return 0


def test_processes_agree(tmp_path: Path, place: str) -> None:
    statuses, said = job(tmp_path, disagree, place)
    assert statuses == [0, 0], said
    assert said == ["rank 1: no such file\n"] * 2


def test_shares_cover_everything_once() -> None:
    for size in (1, 2, 3, 7):
        for count in (7, 8, 100):
            parts = [Ranks(rank, size).part(count) for rank in range(size)]
            assert [i for part in parts for i in range(count)[part]] == list(range(count))
            lengths = {part.stop - part.start for part in parts}
            assert max(lengths) - min(lengths) <= 1


def test_more_processes_than_rays_are_refused() -> None:
    dataset = tiny_dataset(views=1)
    with pytest.raises(InputError, match=r"--batch-size: 2 rays are too few for 3 processes"):
        make_trainer(tiny(batch_size=2), dataset, ranks=Ranks(0, 3))
    assert make_trainer(tiny(batch_size=2), dataset, ranks=ALONE).train_step().rays == 2


def children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((x.partition(b"=")[2].decode() for x in variables if x.startswith(b"RANK=")), "")


def test_a_killed_process_ends_the_job_cleanly(scene: Path, tmp_path: Path, place: str) -> None:
    """As users start it: torchrun and train.py."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    model = ["--net-depth", "2", "--net-width", "16", "--net-width-condition", "16", "--num-samples", "8"]
    flags = ["--batch-size", "32", "--save-every", "2", "--test-every", "0", "--device", place]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
    ]
    command += ["train.py", "--data", str(scene), "--run-dir", str(run_dir), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, *model], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
    try:
        while not list_checkpoints(run_dir) and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, log.read_text()
        victims = [pid for pid in children(process.pid) if rank_of(pid) == "1"]
        assert len(victims) == 1
        os.kill(victims[0], signal.SIGKILL)
        # The launcher tells of the process that failed.
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
    said = log.read_text()
    ours = [line for line in said.splitlines() if line.startswith("mipnerf-fast:")]
    assert len(ours) == 1, said
    # NCCL does not say that a process is lost: there the launcher's signal and a step that does not end do.
    waited = "" if place == "cpu" else r"no step has finished for \d+ s; "
    assert re.search(
        f"rank 0 of 2: {waited}another process of the job has ended or cannot be reached", ours[0]
    )
    assert f"go on with --resume --run-dir {run_dir}, with any number of processes" in ours[0]
    last = list_checkpoints(run_dir)[-1]
    step = load_checkpoint(last).info.step
    # A GPU that waits for the other cannot save.
    assert str(last if place == "cpu" else last.parent) in ours[0]
    config = load_checkpoint(last).info.config
    longer = dataclasses.replace(config, max_steps=step + 2)
    result = run_training(str(scene), longer, "paper", run_dir, device=place, resume=True)
    assert result.step == step + 2
