"""Training: a trainer at work in a run folder, and the command behind `mipnerf-fast train`."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from . import __version__, _native
from .backend import BACKENDS, configure_backend, current_backend
from .cameras import Rays
from .checkpoint import (
    FOLDER,
    Checkpoint,
    check_fresh,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
)
from .config import FastConfig, TrainConfig, check_options
from .cpu_setup import cpu_setup
from .data import Dataset, RayBatches, blender, load_dataset, multiscale
from .data.scene_files import read_json
from .determinism import deterministic
from .durable_files import remove_partial_files
from .environment import choose_device, device_name, revision
from .errors import InputError, PeerLostError
from .fast_training import FastTrainer
from .metrics import mse_to_psnr
from .ops import widest_network
from .ops.fast_captured import kernels_for
from .proposal_training import ProposalTrainer
from .ranks import ALONE, Ranks, join_ranks
from .rendering import render_image
from .run_folder import (
    RunConfig,
    check_resumable,
    check_same_config,
    check_same_run,
    check_writable,
    fingerprint,
)
from .trainer import Trainer
from .trainer_base import DivergedError, StepResult
from .training_reports import ProgressLine, Reports

# Test pixels whose PSNR says which checkpoint is the best: the same ones every time.
_TEST_SAMPLE, _TEST_SEED = 4096, 0


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    step: steps done. seconds: of training alone. psnr: of the training batches since the last report before the
    end, test_psnr: of the fixed sample of test pixels, dB, or None. checkpoint: the last one. interrupted: whether
    a signal ended the run early. skips: steps of the run that changed nothing, because of values that are not finite.
    """

    step: int
    seconds: float
    psnr: float | None
    test_psnr: float | None
    checkpoint: Path
    interrupted: bool
    skips: int = 0


def make_trainer(
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device | str = "cpu",
    max_seconds: float = math.inf,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
) -> Trainer | FastTrainer:
    """The trainer of the configured model's family; arguments as of `Trainer`.

    Errors: InputError where the model trains in one process only, or there are more processes than rays.
    """
    if isinstance(config.model, FastConfig):
        if ranks.size > 1:
            raise InputError("--preset: the fast model trains in one process, without torchrun")
        kind = ProposalTrainer if config.model.sampling == "proposal" else FastTrainer
        return kind(config, dataset, device, max_seconds, checkpoint)
    if ranks.size > config.batch_size:
        raise InputError(f"--batch-size: {config.batch_size} rays are too few for {ranks.size} processes")
    return Trainer(config, dataset, device, max_seconds, checkpoint, ranks)


class StopSignals:
    """While in the context, SIGINT and SIGTERM only set a flag; a second SIGINT interrupts at once.

    In another thread than the main one Python allows no handlers: then the flag is never set.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _StopRenderingError(Exception):
    """Leaves a preview unfinished because a signal asked to stop."""


class _Tester:
    """Measures a trainer's model on test views, outside the training time; processes share the rays."""

    def __init__(
        self, trainer: Trainer | FastTrainer, test: Dataset, stop: StopSignals, ranks: Ranks
    ) -> None:
        self._trainer, self._test, self._stop, self._ranks = trainer, test, stop, ranks
        sample = min(_TEST_SAMPLE, test.pixels.shape[0])
        self._rays, self._target = RayBatches(test, trainer.device).draw(_TEST_SEED, 0, sample)

    def _render(self, rays: Rays, watch: Callable[[int], None] | None = None) -> Tensor:
        """Colours of rays of any shape, [..., 3], in every process."""
        flat, ranks = rays.flatten(), self._ranks
        rgb = torch.zeros(flat.origins.shape[0], 3, device=self._trainer.device)
        part = ranks.part(rgb.shape[0])
        mine = Rays(*(field[part] for field in flat))
        rgb[part] = render_image(self._trainer.model, mine, self._test.white_background, progress=watch).rgb
        ranks.sum_(rgb)
        return rgb.view(*rays.batch_shape, 3)

    def sample_psnr(self) -> float:
        """The PSNR over a fixed random sample of all test pixels: comparable between checkpoints, and cheap."""
        rgb = self._render(self._rays)
        return float(mse_to_psnr(((rgb - self._target) ** 2).mean()))

    def view(self, reports: Reports | None) -> dict[str, Any]:
        """Render one test view in turn, write its preview and return its columns of the metrics."""

        def watch(count: int) -> None:
            # Other processes wait for this one's part of the view.
            if self._stop.requested and self._ranks.size == 1:
                raise _StopRenderingError

        trainer, test = self._trainer, self._test
        index = (trainer.step // trainer.config.test_every - 1) % len(test)
        try:
            rgb = self._render(test.rays(index), watch)
        except _StopRenderingError:
            return {}
        target = test.target(index, trainer.device)
        if reports is not None:
            reports.preview(trainer.step, rgb, target)
        psnr = float(mse_to_psnr(((rgb - target) ** 2).mean()))
        return {"test_view": test.names[index], "test_view_psnr": psnr}


class _Window:
    """Means over the steps since the last report."""

    def __init__(self, trainer: Trainer | FastTrainer) -> None:
        self._trainer = trainer
        self.last: StepResult | None = None
        self.start()

    def start(self) -> None:
        """Begin again."""
        self.steps, self._rays, self._since = 0, 0, self._trainer.seconds
        self._loss, self._mse, self._good = 0.0, 0.0, 0

    def add(self, result: StepResult) -> None:
        """Count a step; what is not finite is in no mean."""
        self.last = result
        self.steps += 1
        self._rays += result.rays
        if not result.is_skipped:
            self._good += 1
            self._loss += result.loss
            self._mse += result.mse

    @property
    def psnr(self) -> float:
        """Of the mean squared error; NaN where no step was good."""
        if not self._good:
            return math.nan
        mse = self._mse / self._good
        return -10 * math.log10(mse) if mse > 0 else math.inf

    @property
    def rays_per_second(self) -> float:
        """Of training alone."""
        return self._rays / max(self._trainer.seconds - self._since, 1e-9)

    def row(self) -> dict[str, Any]:
        """The columns of the metrics, those of the last step that was added."""
        assert self.last is not None
        return {
            "step": self.last.step,
            "seconds": round(self._trainer.seconds, 3),
            "loss": self._loss / self._good if self._good else None,
            "psnr": self.psnr if self._good else None,
            "lr": self.last.rate,
            "rays_per_second": round(self.rays_per_second, 1),
        }


class _Run:
    """A trainer at work in a run folder; of several processes only the first one reports and saves."""

    def __init__(
        self,
        trainer: Trainer | FastTrainer,
        test: Dataset | None,
        run_dir: Path,
        reports: Reports | None,
        progress: ProgressLine,
        stop: StopSignals,
        ranks: Ranks,
    ) -> None:
        self.trainer, self.run_dir, self.stop, self.ranks = trainer, run_dir, stop, ranks
        self.reports, self.progress = reports, progress
        self.tester = _Tester(trainer, test, stop, ranks) if test is not None and len(test) else None
        self.window = _Window(trainer)
        self.last_psnr: float | None = None
        self.test_psnr: float | None = None
        trainer.stop_requested = lambda: stop.requested

    def go(self) -> TrainResult:
        """Train until done or asked to stop; the end is always saved."""
        trainer, config = self.trainer, self.trainer.config
        try:
            while not (trainer.is_done or trainer.is_stopped):
                trainer.launch_step()
                results = trainer.results()
                ends = trainer.is_done or trainer.is_stopped
                saves = ends or trainer.step % config.save_every == 0
                tests = bool(config.test_every) and trainer.step % config.test_every == 0
                if saves or tests:
                    results += trainer.results(wait=True)
                for result in results:
                    self._count(result, has_own_row=(saves or tests) and result.step == trainer.step)
                if saves or tests:
                    self._report(measures=True, renders=tests)
                if saves:
                    self._save()
        except DivergedError as error:
            raise InputError(f"{error}; {self._save_before_failure()}") from None
        except PeerLostError as error:
            raise PeerLostError(f"{error}; {self._save_alone()}") from None
        path = checkpoint_path(self.run_dir, trainer.step)
        if self.reports is not None:
            if not path.exists():
                # Asked to stop before the first step of this part.
                self._save()
            self.reports.curves(0.0)
        return TrainResult(
            trainer.step,
            trainer.seconds,
            self.last_psnr,
            self.test_psnr,
            path,
            interrupted=trainer.is_stopped and not trainer.is_done,
            skips=self.window.last.skips if self.window.last else 0,
        )

    def _count(self, result: StepResult, has_own_row: bool) -> None:
        """Take note of a step whose numbers have arrived."""
        self.window.add(result)
        if result.is_skipped:
            self._say_skipped(result)
        self.progress.update(result.step, self.trainer.seconds, self.window.rays_per_second, self.window.psnr)
        if result.step % self.trainer.config.print_every == 0 and not has_own_row:
            self._report(measures=False, renders=False)

    def _say_skipped(self, result: StepResult) -> None:
        """What was wrong, for the first of a series; it takes a step's time."""
        if not self.ranks.is_writer or result.failures_in_row > 1:
            return
        if result.failures_in_row == 0:
            self.progress.say(
                f"train: step {result.step:,} skipped, the loss scale was too large for float16"
            )
            return
        self.progress.say(
            f"train: step {result.step:,} skipped ({result.skips:,} so far): {result.numbers}; "
            f"{self.trainer.explain_skip(result)}"
        )

    def _report(self, measures: bool, renders: bool) -> None:
        row = self.window.row()
        self.last_psnr = row["psnr"]
        if self.tester is not None and measures:
            row["test_psnr"] = self.test_psnr = self.tester.sample_psnr()
            if renders:
                row |= self.tester.view(self.reports)
        if self.reports is not None:
            self.reports.row(row)
        self.window.start()

    def _save(self) -> None:
        if self.reports is None:
            return
        # The metrics first: a resumed run relies on every row up to its checkpoint.
        self.reports.sync()
        self.trainer.save(checkpoint_path(self.run_dir, self.trainer.step), self.test_psnr)
        prune_checkpoints(self.run_dir, self.trainer.config.keep_checkpoints)
        self.reports.curves()

    def _save_before_failure(self) -> str:
        """Save what the last good step left, and say so."""
        path = checkpoint_path(self.run_dir, self.trainer.step)
        for result in self.trainer.unread_results():
            self._count(result, has_own_row=True)
        # That of an earlier checkpoint, unless it is measured again: the processes need each other for that.
        self.test_psnr = None
        if self.reports is not None and not path.exists():
            if self.window.steps:
                self._report(measures=self.ranks.size == 1, renders=False)
            self._save()
        return f"saved {path}, which no such step has changed; {self.trainer.remedy} may keep it finite"

    def _save_alone(self) -> str:
        """Without the other processes, save the steps that are complete, and say how to go on."""
        resume = f"go on with --resume --run-dir {self.run_dir}, with any number of processes"
        if self.reports is None or self.trainer.device.type == "cuda":
            # A GPU still waits for the others.
            return f"the checkpoints in {self.run_dir / FOLDER} are complete; {resume}"
        path = checkpoint_path(self.run_dir, self.trainer.step)
        if not path.exists():
            self.test_psnr = None
            self._save()
        return f"saved {path}; {resume}"


def run_training(
    data: str,
    config: TrainConfig,
    preset: str,
    run_dir: Path,
    *,
    downscale: int = 1,
    background: str = "white",
    max_minutes: float | None = None,
    device: str = "auto",
    backend: str = "auto",
    resume: bool = False,
) -> TrainResult:
    """Train on a scene into a run folder: `mipnerf-fast train`.

    Everything is checked before anything is written.

    Args:
        data: scene folder or "demo".
        config: of the run; preset: the name it came from, for the record.
        run_dir: made if need be. With checkpoints in it, only `resume` goes on there.
        downscale, background: of the data, see `load_dataset`.
        max_minutes: of training alone, over all resumed parts; None: no limit.
        device: "auto", "cpu" or "cuda".
        backend: "auto", "native" or "reference".
        resume: go on from the last good checkpoint.

    Returns:
        TrainResult. A SIGINT or SIGTERM ends the run after the current step, saved; `interrupted` is set then.

    Under torchrun the processes share every batch and every test view; the first one writes, and resuming takes any
    number of processes.

    Errors: InputError, or OSError where the disk fails; PeerLostError where another process of the job ends.
    """
    run_dir = Path(run_dir)
    if max_minutes is not None and not 0 < max_minutes < math.inf:
        raise InputError(f"--max-minutes: must be positive, got {max_minutes}")
    check_options(config)
    if isinstance(config.model, FastConfig):
        device = _device_of_fast_model(device, backend, config.model)
    place = choose_device(device)
    _check_backend(backend)
    with deterministic(config.deterministic), join_ranks(place) as (ranks, place):
        run_dir, old = ranks.from_first(lambda: _check_folder(run_dir, resume))
        run = RunConfig(
            preset=preset,
            data=str(data),
            downscale=downscale,
            background=background,
            dataset={},
            train=config,
            max_minutes=max_minutes,
            device=place.type,
            backend=backend,
            torch=torch.__version__,
            package=__version__,
            revision=revision(),
        )
        on_cpu = place.type == "cpu"
        setup: AbstractContextManager[list[str]] = cpu_setup() if on_cpu else nullcontext([])
        with setup as notes:
            return _load_and_train(run, run_dir, place, old, notes, ranks)


def _check_folder(run_dir: Path, resume: bool) -> tuple[Path, RunConfig | None]:
    """The folder, and what is known of the run to resume in it."""
    check_writable(run_dir)
    if resume:
        return run_dir, check_resumable(run_dir)
    check_fresh(run_dir)
    return run_dir, None


def _load_and_train(
    run: RunConfig, run_dir: Path, device: torch.device, old: RunConfig | None, notes: list[str], ranks: Ranks
) -> TrainResult:
    """The rest of the checks, those that need the data, and the run."""

    def load() -> tuple[Dataset, Dataset | None]:
        train = load_dataset(run.data, "train", run.background, run.downscale)
        has_test = _has_test_split(run.data)
        return train, load_dataset(run.data, "test", run.background, run.downscale) if has_test else None

    train, test = ranks.together(load)
    config, found = run.train, fingerprint(train)
    for rank, other in enumerate(ranks.gather(found)):
        if other != found:
            raise InputError(f"{run.data}: rank {rank} has other training data: {other}, not {found}")
    if isinstance(config.model, FastConfig):
        config = dataclasses.replace(config, model=config.model.for_images(int(train.width.max())))
    run = dataclasses.replace(run, dataset=found, train=config)

    def continue_from() -> Checkpoint | None:
        if old is None:
            return None
        # A run may have been killed before its first checkpoint: then it starts over.
        checkpoint = latest_checkpoint(run_dir) if list_checkpoints(run_dir) else None
        check_same_run(old, run, checkpoint.info.step if checkpoint else 0)
        if checkpoint is not None:
            # It may have been copied here from another run.
            check_same_config(checkpoint.info.config, run.train, str(checkpoint.path))
        return checkpoint

    return _train_in_folder(run, train, test, run_dir, device, ranks.from_first(continue_from), notes, ranks)


def _train_in_folder(
    run: RunConfig,
    train: Dataset,
    test: Dataset | None,
    run_dir: Path,
    device: torch.device,
    checkpoint: Checkpoint | None,
    notes: list[str],
    ranks: Ranks,
) -> TrainResult:
    config = run.train
    configure_backend(run.backend)
    max_seconds = math.inf if run.max_minutes is None else 60 * run.max_minutes
    trainer = make_trainer(config, train, device, max_seconds, checkpoint, ranks)
    if ranks.is_writer:
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        remove_partial_files(run_dir)
        remove_partial_files(run_dir / FOLDER)
        run.write(run_dir)
        if checkpoint is not None:
            _move_aside_broken(run_dir, checkpoint)
    with StopSignals() as stop:
        progress = ProgressLine(
            trainer.step,
            config.max_steps,
            trainer.seconds,
            max_seconds,
            is_silent=not ranks.is_writer,
            passes=trainer.describe_passes(),
        )
        try:
            with _reports(run_dir, trainer.step, progress, ranks) as reports:
                for note in _opening(run, trainer, train, test, notes):
                    progress.say(note)
                result = _Run(trainer, test, run_dir, reports, progress, stop, ranks).go()
        finally:
            progress.close()
    if ranks.is_writer:
        print(_closing(result, run_dir), file=sys.stderr, flush=True)
    return result


@contextmanager
def _reports(run_dir: Path, step: int, progress: ProgressLine, ranks: Ranks) -> Iterator[Reports | None]:
    """The reports in the process that writes them."""
    if not ranks.is_writer:
        yield None
        return
    with Reports(run_dir, step, progress) as reports:
        yield reports


def _opening(
    run: RunConfig, trainer: Trainer | FastTrainer, train: Dataset, test: Dataset | None, notes: list[str]
) -> list[str]:
    views = f"{len(train)} training views" + (f", {len(test)} test views" if test else ", no test views")
    limit = f"{run.train.max_steps:,} steps" + (f" or {run.max_minutes:g} min" if run.max_minutes else "")
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    lines = [
        f"train: {run.data}, downscale {run.downscale}, {run.background} background: {views}",
        f"train: preset {run.preset}, {size:,} parameters, {trainer.describe_batch()}, for {limit}; "
        f"backend {current_backend()}, {device_name(trainer.device)}, torch {run.torch}",
    ]
    if notes:
        lines.append(f"train: {'; '.join(notes)}")
    if trainer.step:
        lines.append(f"train: resumed at step {trainer.step:,}, after {trainer.seconds:.1f} s")
    return lines


def _closing(result: TrainResult, run_dir: Path) -> str:
    test = "" if result.test_psnr is None else f", {result.test_psnr:.2f} dB on a sample of test pixels"
    verb = "interrupted" if result.interrupted else "done"
    skipped = f", {result.skips:,} steps skipped" if result.skips else ""
    again = f"; go on with --resume --run-dir {run_dir}" if result.interrupted else ""
    return (
        f"train: {verb} at step {result.step:,} after {result.seconds:.1f} s of training{test}{skipped}; "
        f"saved {result.checkpoint}{again}"
    )


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise InputError(f"--backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "native" and not _native.available():
        raise InputError(f"--backend: native was asked for, but {_native.why_missing()}")


def _device_of_fast_model(device: str, backend: str, model: FastConfig) -> str:
    """A GPU where the native library has kernels for it, else the CPU."""
    by_reference = "reference" in (backend, current_backend())
    if not by_reference and not _native.available():
        raise InputError(
            f"--preset: the fast model needs the native library, but {_native.why_missing()}; "
            "--backend reference trains it without, many times slower"
        )
    missing = "the reference trains it on the CPU" if by_reference else kernels_for(torch.device("cuda"))
    if not missing and model.net_width > (widest := widest_network(torch.device("cuda"))):
        missing = f"FastConfig.net_width is {model.net_width}, its kernels there take up to {widest}"
    if model.sampling == "proposal":
        missing = "with a proposal it trains on the CPU"
    if device == "cuda" and missing:
        raise InputError(f"--device: the fast model cannot train on cuda: {missing}")
    return "cpu" if missing else device


def _has_test_split(data: str) -> bool:
    if data == "demo":
        return True
    root = Path(data)
    if multiscale.metadata_file(root).is_file():
        return "test" in read_json(multiscale.metadata_file(root))
    return "test" in blender.splits(root)


def _move_aside_broken(run_dir: Path, good: Checkpoint) -> None:
    """Rename checkpoints newer than the good one: they are broken, and must not count among the last K."""
    paths = list_checkpoints(run_dir)
    for path in paths[paths.index(good.path) + 1 :]:
        path.rename(path.with_suffix(".broken"))
