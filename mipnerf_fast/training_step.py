"""One step of training as work for the device alone: nothing in it reads a value back or decides on the host.

The step's number is a number on the device; it feeds the counter-based random numbers and the learning rate. A step
whose loss or gradient is not finite is skipped by the optimiser's own kernel. So the two halves of the step, before and
after the sum over processes, can be captured as CUDA graphs and replayed, and the same functions run on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .cameras import Rays
from .config import TrainConfig
from .counter_rng import CounterRandom
from .data import RayBatches
from .flat_parameters import FlatParameters
from .losses import weighted_loss
from .model import Model
from .ops import keeping_weights
from .ranks import ALONE, Ranks
from .schedules import log_lerp, warm_up

BETAS = (0.9, 0.999)
# Behind the gradients in the one tensor that is summed over the processes: the loss, the squared error, what the
# processes put in.
_EXTRA = ("loss", "mse", "time_share", "stop")
# Skipped steps: all, and but for those that only lowered the loss scale, of these the last in a row.
_COUNTS = ("skips", "failures", "failures_in_row")
# What the device knows about the run, float64 (which holds the integers among it exactly). Neighbours are written
# together, since on a GPU every write is a launch.
# step: begun. rate, norm, loss, mse, skipped: of the last step. scale, good: the loss scale, and steps since it
# changed.
WORDS = ("step", "rate", "norm", *_EXTRA, "skipped", *_COUNTS, "scale", "good")
# Of the loss in float16: doubled after so many good steps, halved by a bad one, in these bounds.
_SCALE_STEPS, _LARGEST_SCALE, _FIRST_SCALE = 2000, 2.0**24, 2.0**12


def clip_gradients(gradients: Tensor, max_value: float, max_norm: float) -> Tensor:
    """Clip gradients in place, by value and then by norm; return the norm in between.

    g <- clip(g, -max_value, max_value), then g <- g min(1, max_norm / (1e-7 + ||g||)). A limit of 0 does nothing.

    Args:
        gradients: of all parameters, [P].

    Source: algorithm 1.8.
    """
    if max_value > 0:
        gradients.clamp_(-max_value, max_value)
    norm: Tensor = torch.linalg.vector_norm(gradients)
    if max_norm > 0:
        gradients.mul_(torch.clamp(max_norm / (1e-7 + norm), max=1.0))
    return norm


def scales_loss(config: TrainConfig) -> bool:
    """Whether the network's products are in float16, whose range needs a scaled loss."""
    return getattr(config.model, "mlp_dtype", "auto") == "fp16"


class TrainingStep:
    """The step's two halves and what they work on.

    Args:
        config: of the run.
        model: on its device; its parameters are moved into one tensor (`FlatParameters`).
        batches: on the same device.
        chunk_rays: rays per forward and backward pass.
        ranks: this process among those that share the batch, each taking the same number of consecutive rays.

    words: float64 on the device, what is known after a step; see WORDS. loss, squares: of the rays whose gradients are
    in `flat`, on the device too; squares is the squared error summed over rays and channels at the finest level.
    Everything that goes on from step to step is in `words`, `flat` and `optimizer`.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        batches: RayBatches,
        chunk_rays: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.model, self.batches, self.ranks = config, model, batches, ranks
        self.chunk_rays = chunk_rays
        self.flat = FlatParameters(model, len(_EXTRA))
        device = self.flat.values.device
        self.words = torch.zeros(len(WORDS), dtype=torch.float64, device=device)
        self._word = dict(zip(WORDS, self.words.unbind(), strict=True))
        self._extra_words, self._count_words = (
            self.words[WORDS.index(names[0]) :][: len(names)] for names in (_EXTRA, _COUNTS)
        )
        self._extra = self.flat.sums[len(self.flat.gradients) :]
        self.loss, self.squares = self._extra[:2].unbind()
        # Written by the host before a step, where it has something to say: time_share and stop.
        self.inputs = torch.zeros(2, dtype=torch.float32, device=device)
        self.rows = torch.arange(config.batch_size, device=device)
        self.scales_loss = scales_loss(config)
        self._word["scale"].fill_(_FIRST_SCALE if self.scales_loss else 1.0)
        self._rate = torch.zeros((), dtype=torch.float32, device=device)
        self._bad = torch.zeros((), dtype=torch.float32, device=device)
        self.optimizer = torch.optim.Adam(
            [self.flat.values],
            self._rate,
            betas=BETAS,
            eps=config.adam_eps,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.optimizer.state[self.flat.values] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(self.flat.values),
            "exp_avg_sq": torch.zeros_like(self.flat.values),
        }

    def moments(self, name: str) -> dict[str, Tensor]:
        """One of Adam's moments, "exp_avg" or "exp_avg_sq", by parameter name: views."""
        return self.flat.split(self.optimizer.state[self.flat.values][name].detach())

    def go_on_from(self, step: int, skips: int, failures: int, scale: float, good: int) -> None:
        """Continue from a step of another run; weights and moments are copied in place beside this."""
        known = {"step": step, "skips": skips, "failures": failures, "good": good}
        for name, value in known.items():
            self._word[name].fill_(value)
        if self.scales_loss:
            self._word["scale"].fill_(scale)
        self.optimizer.state[self.flat.values]["step"].fill_(step - skips)

    def gradients(self) -> None:
        """The first half: draw the batch; leave the gradients and losses of this process's rays in `sums`."""
        number = self._word["step"].add_(1).to(torch.int64)
        rays, target = self.batches.draw(self.config.seed, number, self.config.batch_size)
        total = self.total_lossmult(rays)
        part = self.ranks.part(self.config.batch_size)
        self.flat.sums.zero_()
        self._extra[2:].copy_(self.inputs)
        with keeping_weights(self.model):
            self.accumulate_gradients(
                number, Rays(*(field[part] for field in rays)), target[part], total, self.rows[part]
            )

    def update(self) -> None:
        """The second half: from the gradients of the whole batch to new parameters, unless something is not finite."""
        config, word, gradients = self.config, self._word, self.flat.gradients
        if self.scales_loss:
            gradients.mul_((1.0 / word["scale"]).to(torch.float32))
        # By value, an infinity would be clipped to a number: look before that.
        raw = torch.linalg.vector_norm(gradients)
        probe = raw + self.loss
        # The difference is 0, or NaN where the probe is NaN or infinite.
        bad = torch.ne(probe - probe, 0, out=self._bad)
        norm = raw
        if config.grad_max_value > 0 or config.grad_max_norm > 0:
            norm = clip_gradients(gradients, config.grad_max_value, config.grad_max_norm)
        self.squares.div_(3 * config.batch_size)
        self._extra_words.copy_(self._extra)
        word["norm"].copy_(norm)
        progress = torch.maximum(word["step"] / config.max_steps, word["time_share"])
        rate = torch.as_tensor(log_lerp(progress, config.lr_init, config.lr_final))
        warm = warm_up(word["step"], config.lr_delay_steps, config.lr_delay_mult)
        self._rate.copy_(torch.mul(rate, warm, out=word["rate"]))
        # As torch's own gradient scaler tells a fused optimiser to leave everything as it is.
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        word["skipped"].copy_(bad)
        self._count_words.add_(bad)
        if self.scales_loss:
            self._adapt_scale(bad)
        word["failures_in_row"].mul_(bad)

    def _adapt_scale(self, bad: Tensor) -> None:
        """Halve the loss scale after a bad step, which above 1 is no failure, and double it after many good ones."""
        word, scale = self._word, self._word["scale"]
        self._count_words[1:].sub_(bad * (scale > 1))
        good = (word["good"] + 1) * (1 - bad)
        grows = good >= _SCALE_STEPS
        factor = torch.where(bad > 0, 0.5, torch.where(grows, 2.0, 1.0))
        word["good"].copy_(good * ~grows)
        scale.copy_(torch.clamp(scale * factor, 1.0, _LARGEST_SCALE))

    def total_lossmult(self, rays: Rays) -> Tensor:
        """The sum of the area weights of a whole batch, before any of it is cut into parts: what losses are over."""
        if self.config.disable_multiscale_loss:
            return torch.full_like(rays.lossmult[0, 0], self.config.batch_size)
        return rays.lossmult.sum()

    def accumulate_gradients(
        self, step: int | Tensor, rays: Rays, target: Tensor, total: Tensor, rows: Tensor
    ) -> None:
        """Add the gradient of some rays' loss to the parameters' .grad, chunk by chunk; the loss to `loss`.

        loss = coarse_loss_mult * (levels but the last) + last level + weight_decay_mult * mean(parameter^2), every
        level normalised by the lossmult of the whole batch. The weight decay is the first process's. The gradient is
        that of the loss times the loss scale.

        Args:
            step: for the random numbers.
            rays, target: [B, .] and [B, 3].
            total: `total_lossmult` of the whole batch.
            rows: int64 [B], the rays' indices in the whole batch.

        Source: algorithm 1.8.
        """
        config = self.config
        lossmult = torch.ones_like(rays.lossmult) if config.disable_multiscale_loss else rays.lossmult
        scale = self._word["scale"].to(torch.float32) if self.scales_loss else None
        for start in range(0, target.shape[0], self.chunk_rays):
            part = slice(start, min(start + self.chunk_rays, target.shape[0]))
            levels = self.model(
                Rays(*(field[part] for field in rays)),
                randomized=True,
                white_background=self.batches.white_background,
                generator=CounterRandom(config.seed, step, rows[part]),
            )
            losses = [
                weighted_loss(level.rgb, target[part], lossmult[part], config.loss, config.loss_beta, total)
                for level in levels
            ]
            weighted = [config.coarse_loss_mult * loss for loss in losses[:-1]] + losses[-1:]
            self.flat.add_gradients(weighted if scale is None else [loss * scale for loss in weighted])
            self.loss.add_(sum(weighted[1:], weighted[0]).detach())
            finest = levels[-1].rgb.detach()
            self.squares.add_(functional.mse_loss(finest, target[part], reduction="sum"))
        if config.weight_decay_mult > 0 and self.ranks.is_writer:
            # d/dp of the mean of p^2, in closed form.
            values, factor = self.flat.values.detach(), config.weight_decay_mult / self.flat.size
            slope = 2 * factor * values
            self.flat.gradients.add_(slope if scale is None else slope * scale)
            self.loss.add_(factor * (values * values).sum())
