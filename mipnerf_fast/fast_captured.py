"""The fast model's training step on a GPU: one CUDA graph from drawn pixels to updated parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import FastConfig, TrainConfig
from .fast_model import FastModel
from .ops.fast_captured import (
    GROUP_RAYS,
    StepClock,
    draw_rays_captured,
    fast_pace_captured,
    fast_train_step_captured,
    occupancy_update_captured,
    rays_of_pace,
    sparse_adam_captured,
)
from .ops.fast_step import FastFields, FastGradients, PixelSource, table_sums
from .ops.finite import is_checking

# Steps whose statistics are kept on the device until they are read: reading waits for it.
READ_EVERY = 16
# Room for so many times the samples that a step shall have; rays beyond it wait for another step.
_ROOM = 2


class AdamSettings(NamedTuple):
    """Of Adam: rates of the networks in proportion to that of the tables, and what every step shares."""

    network_ratio: float
    beta1: float
    beta2: float
    eps: float


class CapturedStep:
    """The training step of a fast model on its GPU; the second step is captured and later ones replay it.

    Its tables are read in float16, from a copy that Adam writes beside the float32 values. The host waits for nothing;
    `history` and the buffers of the model are read when somebody wants them. With config.deterministic every sum is
    taken in a fixed order or in fixed point: then nothing decides a step but parameters, moments, the model's buffers
    and the step's number, all of which a checkpoint holds.

    Where config.capture is false every step launches the same kernels on the same arrays; so it does under the finite
    check, which waits for their values.

    Args:
        config: of the run. model: on the GPU; its buffers samples_per_ray and skipped_steps are kept up to date.
        source: pixels on the GPU. random_background, background: see `ops.draw_rays`.
        parameters, gradients, moments: by name, as the trainer keeps them.
        adam: settings. step: done so far. least, most: rays of a step.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: FastModel,
        source: PixelSource,
        random_background: bool,
        background: float,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        moments: dict[str, dict[str, Tensor]],
        adam: AdamSettings,
        step: int,
        least: int,
        most: int,
    ) -> None:
        assert isinstance(config.model, FastConfig)
        self._config, self._model, self._source = config, model, source
        self._random_background, self._background = random_background, background
        self._parameters, self._gradients, self._moments = parameters, gradients, moments
        self._adam, self._least, self._most = adam, least, most
        self._capacity = -(-_ROOM * config.batch_size // GROUP_RAYS) * GROUP_RAYS
        device = model.tables.device
        pace = model.samples_per_ray.to(torch.float32)
        rays = rays_of_pace(pace, config.batch_size, least, most)
        self._clock = StepClock(
            torch.tensor([step], device=device),
            torch.tensor([rays], dtype=torch.int32, device=device),
            pace,
            torch.zeros(1, device=device),
        )
        self._half_tables = parameters["tables"].to(torch.float16)
        self.fields: FastFields = model.fields()._replace(tables=self._half_tables)
        self._buffers = FastGradients(
            *(gradients.get(name) for name in FastGradients._fields)  # type: ignore[arg-type]
        )
        self._sums = table_sums(parameters["tables"]) if config.deterministic else None
        # Row step % READ_EVERY: the statistics of the step after so many.
        self.history = torch.zeros(READ_EVERY, 6, dtype=torch.float64, device=device)
        self._rows = torch.arange(READ_EVERY, device=device)[:, None]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False

    def __call__(self, learning_rate: float) -> None:
        """Do one step; returns before it is done."""
        self._clock.learning_rate.fill_(learning_rate)
        # The first one loads the kernels, which a capture must not do.
        if not self._is_warm or not self._config.capture or is_checking():
            self._launch()
            self._is_warm = True
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._launch()
        self._graph.replay()

    def update_occupancy(
        self, cell_scale: float, step: int, stride: int, decay: float, max_threshold: float
    ) -> None:
        """Renew the occupancy grid: see `ops.occupancy_update`."""
        occupancy_update_captured(
            self._model.densities,
            cell_scale,
            self._config.seed,
            step,
            stride,
            decay,
            max_threshold,
            self.fields,
        )

    def _launch(self) -> None:
        config, clock, adam = self._config, self._clock, self._adam
        rays, target = draw_rays_captured(
            self._source, config.seed, clock, self._most, self._random_background, self._background
        )
        statistics = fast_train_step_captured(
            rays, target, clock, self._capacity, config.loss_beta, self.fields, self._buffers, self._sums
        )
        for name, values in self._parameters.items():
            is_table = name == "tables"
            sparse_adam_captured(
                values,
                self._gradients[name],
                self._moments["exp_avg"][name],
                self._moments["exp_avg_sq"][name],
                self._half_tables if is_table else None,
                clock,
                1.0 if is_table else adam.network_ratio,
                adam.beta1,
                adam.beta2,
                adam.eps,
            )
        # No index_copy_: on request torch makes it deterministic by a sort, which waits for the host.
        self.history.copy_(torch.where(self._rows == clock.step % READ_EVERY, statistics, self.history))
        fast_pace_captured(statistics, clock, config.batch_size, self._least, self._most)
        self._model.skipped_steps.add_((statistics[4:5] == 0).to(torch.int64))
        self._model.samples_per_ray.copy_(clock.samples_per_ray)
