"""torch.compile takes the whole model with its native operators, as one graph: evaluation and a training step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mipnerf_fast import MipNerf, MipNerfConfig, Rays, cameras, use_backend
from mipnerf_fast.counter_rng import CounterRandom
from mipnerf_fast.losses import weighted_loss

# As many samples, layers and streams of random numbers as every branch needs.
CONFIG = MipNerfConfig(
    num_samples=8,
    max_deg_point=8,
    net_depth=3,
    net_width=64,
    net_width_condition=32,
    skip_layer=1,
    density_noise=0.3,
)


def setting(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[MipNerf, Rays]:
    torch.manual_seed(0)
    c2w = torch.eye(4)[:3]
    c2w[2, 3] = 4.0
    rays = cameras.pinhole_rays(c2w, 4, 6, 5.0).flatten()
    return MipNerf(CONFIG).to(device, dtype), rays.map(lambda field: field.to(device, dtype))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def test_evaluation_compiles_as_one_graph(device: torch.device) -> None:
    model, rays = setting(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with use_backend("native"), torch.no_grad():
        for plain, traced in zip(model(rays), compiled(rays), strict=True):
            # The same operations in the same order: the same bits.
            assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))


class Step:
    """A training step of the model, as far as its gradients."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.rays = setting(device, dtype)
        self.target = torch.rand(24, 3, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        self.rows = torch.arange(24, device=device)

    def loss(self, step: Tensor) -> Tensor:
        rays = self.rays
        coarse, fine = self.model(rays, True, True, CounterRandom(7, step, self.rows))
        of_coarse, of_fine = (
            weighted_loss(level.rgb, self.target, rays.lossmult) for level in (coarse, fine)
        )
        return 0.1 * of_coarse + of_fine

    def results(self, loss: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
        """Loss and gradients of two steps."""
        found = []
        for step in (1, 2):
            self.model.zero_grad()
            value = loss(torch.tensor(step, device=self.rows.device))
            value.backward()
            gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
            found.append([value.detach(), *gradients])
        # The step's number is an input of a graph, not a constant in it.
        assert not torch.equal(found[0][0], found[1][0])
        return found


def test_a_training_step_compiles_as_one_graph(device: torch.device) -> None:
    step = Step(device)
    with use_backend("native"):
        plain = step.results(step.loss)
        traced = step.results(torch.compile(step.loss, fullgraph=True, backend="aot_eager"))
    for found, wanted in zip(traced, plain, strict=True):
        for a, b in zip(found, wanted, strict=True):
            # The compiler may take the sums over a gradient's several uses in another order: a few ulp of its norm.
            assert (a - b).norm() <= 8 * torch.finfo(torch.float32).eps * b.norm()


def test_a_training_step_compiles_to_kernels(device: torch.device) -> None:
    """By inductor, which fuses what lies between the operators and rounds it otherwise: no further from float64."""
    exact, step = Step(device, torch.float64), Step(device)
    with use_backend("reference"):
        wanted = exact.results(exact.loss)
    with use_backend("native"):
        plain = step.results(step.loss)
        compiled = step.results(torch.compile(step.loss, fullgraph=True, backend="inductor"))

    def errors(found: list[list[Tensor]]) -> list[Tensor]:
        """Of the loss and of the whole gradient of each step."""
        return [
            (torch.cat([(a.double() - b).flatten() for a, b in zip(x, y, strict=True)])).norm()
            for got, want in zip(found, wanted, strict=True)
            for x, y in ((got[:1], want[:1]), (got[1:], want[1:]))
        ]

    sizes = [part.norm() for want in wanted for part in (want[0], torch.cat([g.flatten() for g in want[1:]]))]
    for error, usual, size in zip(errors(compiled), errors(plain), sizes, strict=True):
        assert error <= 2 * usual + 8 * torch.finfo(torch.float32).eps * size
        assert error > 0  # in float32
