"""Training of the fast model with a proposal: autograd over the operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cameras import Rays
from .config import FastConfig
from .counter_rng import FENCEPOSTS, counter_uniform
from .data import Dataset
from .fast_model import FastModel
from .fast_skips import Gradients
from .fast_training import DEVIATION_PER_PIXEL, FastTrainer
from .ops.fast_step import MarchRays, StepStatistics
from .proposal_model import ProposalModel
from .reference import interlevel_loss


class ProposalTrainer(FastTrainer):
    """A `FastTrainer` whose step has two levels: the proposal learns from the final level's weights.

    The loss is smooth L1 on the final colours plus the interlevel loss, whose gradient reaches the proposal alone. The
    number of rays is fixed: batch_size / num_samples. Everything else, the drawing of pixels, the guard against
    gradients that are not finite, Adam on the entries that were touched, is `FastTrainer`'s.
    """

    _moved_within_a_step = ()

    def _build_model(self, config: FastConfig) -> FastModel:
        return ProposalModel(config)

    def _scale_range(self, dataset: Dataset) -> tuple[float, float]:
        """Across the ray a sample is as wide as its pixel; along it no longer than a proposal's interval."""
        side = 4 * self.settings.box_half
        low = (dataset.near / dataset.focal).min().item() * DEVIATION_PER_PIXEL / side
        high = (dataset.far / dataset.focal).max().item() * DEVIATION_PER_PIXEL / side
        longest = (dataset.far - dataset.near).max().item() / self.settings.proposal_samples
        return low, max(high, longest / 6 / side)  # sqrt((length^2 / 12) / 3)

    def _ray_count(self) -> int:
        return math.ceil(self.config.batch_size / self.settings.num_samples)

    def _renew_occupancy(self) -> None:
        """There is no grid to renew."""

    def _learn(self, rays: MarchRays, target: Tensor, rate: float) -> StepStatistics:
        found = self._add_gradients(rays, target)
        if found.is_finite:
            self._update(rate)
        return found

    def _add_gradients(self, rays: MarchRays, target: Tensor) -> StepStatistics:
        """Add the gradients of a batch to `_gradients`, unless one of them is not finite."""
        found, grads = self._differentiate(self.step, rays, target, torch.arange(target.shape[0]))
        if found.is_finite:
            for name, grad in grads.items():
                self._gradients[name].add_(grad)
        return found

    def _composed_gradients(
        self, step: int, rays: MarchRays, target: Tensor, part: slice, total: int
    ) -> Gradients:
        share = target.shape[0] / total
        return self._differentiate(step, rays, target, torch.arange(part.start, part.stop), share)[1]

    def _differentiate(
        self, step: int, rays: MarchRays, target: Tensor, rows: Tensor, share: float = 1.0
    ) -> tuple[StepStatistics, Gradients]:
        """What a step finds, and its gradients.

        Args:
            step: steps done before it. rays, target: of its batch, or of a part that is such a share of it.
            rows: int64 [B], their numbers in the batch.
        """
        model, config = self.model, self.config
        assert isinstance(model, ProposalModel)
        count = rows.shape[0]
        sizes = (self.settings.proposal_samples + 1, self.settings.num_samples + 1)
        first, second = (
            counter_uniform(config.seed, step, FENCEPOSTS + level, rows, size)
            for level, size in enumerate(sizes)
        )
        norms = torch.linalg.vector_norm(rays.directions, dim=-1, keepdim=True)
        cones = Rays(
            rays.origins,
            rays.directions,
            rays.directions / norms,
            rays.radii,
            rays.near,
            rays.far,
            torch.ones_like(norms),
        )
        with torch.enable_grad():
            levels = model.levels(cones, rays.background, (first, second))
            rgb = levels.result.rgb
            loss = torch.nn.functional.smooth_l1_loss(rgb, target, beta=config.loss_beta)
            weights = levels.result.weights.detach().reshape(count, -1)
            teaching = interlevel_loss(
                levels.t_vals, weights, levels.proposal_t_vals, levels.proposal_weights
            )
            names = [name for name, _ in model.named_parameters()]
            grads = torch.autograd.grad(share * (loss + teaching), list(model.parameters()))
        is_finite = bool(loss.isfinite()) and all(bool(grad.isfinite().all()) for grad in grads)
        squared = float(((rgb.detach() - target) ** 2).mean())
        counted = int((weights > 0).sum())
        found = StepStatistics(float(loss.detach()), squared, weights.numel(), counted, is_finite)
        return found, dict(zip(names, grads, strict=True))
