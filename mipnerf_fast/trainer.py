"""The trainer: a model, its batches and its step, launched ahead of what is known of it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .cameras import Rays
from .captured_step import Captured, cuda_graphs
from .checkpoint import MOMENTS, Checkpoint, CheckpointInfo
from .config import TrainConfig
from .data import Dataset, RayBatches
from .errors import PeerLostError
from .memory import bytes_per_ray, choose_chunk, measured_bytes_per_ray
from .model import build_model
from .ops.finite import NonFiniteError, check_finite, checking
from .ranks import ALONE, Ranks
from .readback import Readback
from .trainer_base import DivergedError, StepResult, TrainerBase
from .training_step import WORDS, TrainingStep

# Steps that the host may be ahead of a GPU; a CPU does a step when it is launched.
_STEPS_AHEAD = 4
# Seconds that a process that was asked to stop waits for a step that does not come.
_PATIENCE = 15.0
# Of a chunk, what a step that is done again takes at once: the recording of the step keeps the memory of a whole one.
_SHARE_OF_CHUNK = 4


class Trainer(TrainerBase):
    """A model, its optimiser and its batches: everything that a step needs and a checkpoint holds.

    Random numbers depend on (seed, step, ray) alone, so a trainer built from a checkpoint goes on exactly as the one
    that wrote it would have, bit by bit on the CPU with as many threads (and without a time limit: that makes the
    learning rate depend on the clock).

    On a GPU the step is captured as a CUDA graph (two where several processes sum their gradients in between), unless
    config.capture is false, and the host only replays it; numbers come back some steps later.

    A step whose loss or gradient is not finite changes nothing but the counts.

    Args:
        config: of the run.
        dataset: training views.
        device: to train on.
        max_seconds: of training; the learning rate follows max(step / max_steps, seconds / max_seconds).
        checkpoint: to go on from, or None. Its configuration must describe the same model.
        ranks: this process among those that share every batch; the clock and the weights are the first one's.
    """

    remedy = "a smaller lr_init, or grad_max_norm,"

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        device: torch.device | str = "cpu",
        max_seconds: float = math.inf,
        checkpoint: Checkpoint | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(config, device, max_seconds, checkpoint)
        self.ranks = ranks
        self.white_background = dataset.white_background
        self.batches = RayBatches(dataset, self.device, config.batching)
        # The same weights on every device, and the caller's global random numbers left alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = build_model(config.model)
        if checkpoint is not None:
            model.load_state_dict(checkpoint.weights())
        self.model = model.to(self.device)
        share = ranks.part(config.batch_size)
        self.work = TrainingStep(config, self.model, self.batches, share.stop - share.start, ranks)
        if checkpoint is not None:
            info = checkpoint.info
            self.work.go_on_from(info.step, info.skips, info.failures, info.loss_scale, info.good_steps)
            for moment in MOMENTS:
                for name, view in self.work.moments(moment).items():
                    view.copy_(checkpoint.moments(moment)[name])
        ranks.broadcast_(self.work.flat.values.detach())
        self.parameters = list(self.model.parameters())
        on_cuda = self.device.type == "cuda"
        self._readback = Readback(self.work.words, _STEPS_AHEAD if on_cuda else 1)
        self._has_inputs = math.isfinite(max_seconds) or ranks.size > 1
        self._inputs = [torch.zeros(2, pin_memory=on_cuda) for _ in range(self._readback.depth)]
        self._stream = torch.cuda.Stream(self.device) if on_cuda else None
        self._halves: tuple[Callable[[], None], ...] = (self.work.gradients, self.work.update)
        if ranks.size == 1:
            self._halves = (self._whole,)
        if self._stream is not None and config.capture:
            record = cuda_graphs(self._stream)
            self._halves = tuple(Captured(half, record) for half in self._halves)
        self.chunk_rays = self.work.chunk_rays = self._choose_chunk(checkpoint, share.stop - share.start)
        # Steps after which all processes know that it is over: the last one that any may have launched by then.
        self._stops_at = self._time_ends_at = math.inf
        if self.seconds >= max_seconds:
            self._time_ends_at = self.step
        self._failure: tuple[float, str] | None = None

    def _choose_chunk(self, checkpoint: Checkpoint | None, rays: int) -> int:
        """As configured, as the run began, or as memory allows; never more than this process's rays."""
        config = self.config
        chosen = config.chunk_rays or (checkpoint.info.chunk_rays if checkpoint else 0)
        if chosen:
            return min(chosen, rays)
        if self.device.type == "cuda":
            return choose_chunk(rays, measured_bytes_per_ray(self._probe, self.device), self.device)
        return choose_chunk(rays, bytes_per_ray(config), self.device)

    def _probe(self, count: int) -> None:
        """A pass of so many rays, for its memory."""
        rays, target = self.batches.draw(self.config.seed, 0, count)
        rows = torch.arange(count, device=self.device)
        self.work.accumulate_gradients(0, rays, target, rays.lossmult.sum(), rows)

    def _whole(self) -> None:
        self.work.gradients()
        self.work.update()

    @property
    def is_done(self) -> bool:
        """Whether the steps or the time are used up; the same in all processes."""
        if self.ranks.size == 1:
            return super().is_done
        return self.step >= min(self.config.max_steps, self._time_ends_at)

    @property
    def is_stopped(self) -> bool:
        """Whether the run ends here because that was requested, of any process; the same in all of them."""
        return self.stop_requested() if self.ranks.size == 1 else self.step >= self._stops_at

    def launch_step(self) -> None:
        """Begin a step; its result comes from `results`, maybe some steps later; it is timed.

        Errors: PeerLostError where another process has ended.
        """
        start = time.perf_counter()
        if self._readback.is_full:
            # Only where nobody asks for results.
            self._receive(wait=True)
        if self._stream is None:
            self._launch()
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                self._launch()
        self.step += 1
        self.seconds += time.perf_counter() - start

    def _launch(self) -> None:
        if self._has_inputs:
            # Its earlier contents have been read: the result of that step has been received.
            host = self._inputs[self.step % self._readback.depth]
            host[0] = self.time_share if self.ranks.is_writer else 0.0
            host[1] = float(self.stop_requested())
            self.work.inputs.copy_(host, non_blocking=True)
        for k, half in enumerate(self._halves):
            if k:
                self.ranks.sum_(self.work.flat.sums)
            half()
        self._readback.send()

    def results(self, wait: bool = False) -> list[StepResult]:
        """The results, in order, of the steps that have finished since the last call; it is timed.

        Args:
            wait: for all steps that have been launched.

        Errors: DivergedError after config.max_skips_in_row or config.max_skips skipped steps; PeerLostError.
        """
        start = time.perf_counter()
        # Room for the next one: so every process knows of a step by the time it has launched so many more.
        while self._receive(wait or self._readback.is_full):
            pass
        self.seconds += time.perf_counter() - start
        if self._failure and self.step >= self._failure[0]:
            self._wait()
            raise DivergedError(self._failure[1])
        return self.unread_results()

    def _receive(self, wait: bool) -> bool:
        """Take one result, if it is there."""
        numbers = self._readback.receive(wait, self._be_patient)
        if not numbers:
            return False
        found = dict(zip(WORDS, numbers, strict=True))
        step = int(found["step"])
        # Until this result is received, that many steps may be launched after it; from then on everybody knows.
        last_launched = step + self._readback.depth - 1
        if found["time_share"] >= 1:
            self._time_ends_at = min(self._time_ends_at, last_launched)
        if found["stop"] > 0:
            self._stops_at = min(self._stops_at, last_launched)
        result = StepResult(
            found["loss"],
            found["mse"],
            self.config.batch_size,
            step,
            found["rate"],
            found["norm"],
            bool(found["skipped"]),
            int(found["skips"]),
            int(found["failures_in_row"]),
        )
        if self._failure is None and (message := self.divergence(result, int(found["failures"]))):
            self._failure = (last_launched, message)
        self._results.append(result)
        return True

    def _be_patient(self, waited: float) -> None:
        """A process that is told to end, and whose step does not, has lost the others: NCCL does not say so itself."""
        if self.ranks.size > 1 and waited > _PATIENCE and self.stop_requested():
            raise PeerLostError(
                f"rank {self.ranks.rank} of {self.ranks.size}: no step has finished for {waited:.0f} s; another "
                "process of the job has ended or cannot be reached"
            )

    def explain_skip(self, result: StepResult) -> str:
        """Where the first value that is not finite arises in the batch of a skipped step, in words.

        The whole batch is done again under the finite check, with the weights of now: skipping has not changed them,
        but on a GPU some later steps may have. Where there is no memory for that, it says so.
        """
        self._wait()
        config, work, step = self.config, self.work, result.step
        work.flat.sums.zero_()
        size, first = max(1, self.chunk_rays // _SHARE_OF_CHUNK), 0
        try:
            with checking():
                rays, target = self.batches.draw(config.seed, step, config.batch_size)
                rows, total = torch.arange(config.batch_size, device=self.device), work.total_lossmult(rays)
                for name, field in zip(Rays._fields, rays, strict=True):
                    check_finite("batch", name, field)
                check_finite("batch", "target", target)
                for first in range(0, config.batch_size, size):
                    part = slice(first, first + size)
                    chunk = Rays(*(field[part] for field in rays))
                    work.accumulate_gradients(step, chunk, target[part], total, rows[part])
                for name, parameter in self.model.named_parameters():
                    if parameter.grad is not None:
                        check_finite("backward", f"the gradient of {name}", parameter.grad, "none")
        except NonFiniteError as error:
            if error.ray is None:
                return str(error)
            ray = first + error.ray
            where = self.batches.describe(config.seed, step, config.batch_size, ray)
            return error.of_batch(ray, where)
        except torch.OutOfMemoryError:
            return "where it arises could not be located: out of memory"
        finally:
            work.flat.sums.zero_()
        return f"done again with the weights of step {self.step}, every operation is finite"

    def _wait(self) -> None:
        while self._receive(wait=True):
            pass

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Of Adam: {"exp_avg": {parameter name: tensor}, "exp_avg_sq": ...}."""
        return {moment: self.work.moments(moment) for moment in MOMENTS}

    def save(self, path: Path, test_psnr: float | None) -> None:
        """Write a checkpoint of the last step that was launched."""
        self._wait()
        super().save(path, test_psnr)

    def checkpoint_info(self, test_psnr: float | None) -> CheckpointInfo:
        """What the checkpoint of now says about itself."""
        known = dict(zip(WORDS, self.work.words.tolist(), strict=True))
        return dataclasses.replace(
            super().checkpoint_info(test_psnr),
            skips=int(known["skips"]),
            failures=int(known["failures"]),
            loss_scale=known["scale"],
            good_steps=int(known["good"]),
        )

    def describe_batch(self) -> str:
        """What a step takes, in words."""
        share = self.ranks.part(self.config.batch_size)
        of_all = ""
        if self.ranks.size > 1:
            of_all = f", {share.stop - share.start:,} for each of {self.ranks.size} processes"
        graph = ", captured" if isinstance(self._halves[0], Captured) else ""
        return f"{self.config.batch_size:,} rays a step{of_all} in {self.describe_passes()}{graph}"

    def describe_passes(self) -> str:
        """How this process's rays of a step are cut, in a few words."""
        share = self.ranks.part(self.config.batch_size)
        passes = math.ceil((share.stop - share.start) / self.chunk_rays)
        return "one pass" if passes == 1 else f"{passes} passes of {self.chunk_rays:,}"
