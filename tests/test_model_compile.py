"""torch.compile takes the whole model with its native operators, as one graph: evaluation and a training step."""

from __future__ import annotations

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


def setting(device: torch.device) -> tuple[MipNerf, Rays]:
    torch.manual_seed(0)
    c2w = torch.eye(4)[:3]
    c2w[2, 3] = 4.0
    rays = cameras.pinhole_rays(c2w, 4, 6, 5.0).flatten()
    return MipNerf(CONFIG).to(device), Rays(*(field.to(device) for field in rays))


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


def test_a_training_step_compiles_as_one_graph(device: torch.device) -> None:
    model, rays = setting(device)
    target, rows = torch.rand(24, 3, device=device), torch.arange(24, device=device)

    def loss(step: Tensor) -> Tensor:
        coarse, fine = model(rays, True, True, CounterRandom(7, step, rows))
        of_coarse, of_fine = (weighted_loss(level.rgb, target, rays.lossmult) for level in (coarse, fine))
        return 0.1 * of_coarse + of_fine

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with use_backend("native"):
        found = []
        for function in (loss, compiled):
            for step in (1, 2):
                model.zero_grad()
                value = function(torch.tensor(step, device=device))
                value.backward()
                gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                found.append([value.detach(), *gradients])
    for plain, traced in zip(found[:2], found[2:], strict=True):
        for a, b in zip(plain, traced, strict=True):
            # The compiler may take the sums over a gradient's several uses in another order: a few ulp of its norm.
            assert (a - b).norm() <= 8 * torch.finfo(torch.float32).eps * a.norm()
    # The step's number is an input of the graph, not a constant in it.
    assert not torch.equal(found[2][0], found[3][0])
