"""Sampling by a proposal: contraction, the interlevel loss, training, and a scene that no box holds."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from test_fast_training import _spheres
from tiny_runs import write_scene
from torch import Tensor

from mipnerf_fast import FastConfig, InputError, preset, reference, use_backend
from mipnerf_fast.cameras import pinhole_rays
from mipnerf_fast.checkpoint import load_checkpoint
from mipnerf_fast.config import TrainConfig, from_dict, to_dict
from mipnerf_fast.data import Dataset
from mipnerf_fast.fast_training import FastTrainer
from mipnerf_fast.model import build_model
from mipnerf_fast.proposal_model import ProposalModel
from mipnerf_fast.proposal_training import ProposalTrainer
from mipnerf_fast.rendering import rays_per_chunk, render_image
from mipnerf_fast.training import make_trainer, run_training

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = FastConfig(
    levels=4,
    finest_resolution=64,
    log2_table_size=13,
    occupancy_resolution=32,
    net_width=32,
    sampling="proposal",
    proposal_samples=24,
    num_samples=12,
)


def _config(steps: int, model: FastConfig = TINY, **changes: object) -> TrainConfig:
    fast = dataclasses.replace(preset("fast"), model=model, max_steps=steps, lr_delay_steps=20)
    return dataclasses.replace(fast, **{"batch_size": 1536, **changes})  # type: ignore[arg-type]


def _psnr(model: object, dataset: Dataset, index: int) -> float:
    rgb = model.render_rays(dataset.rays(index)).rgb  # type: ignore[attr-defined]
    return -10 * math.log10(((rgb - dataset.target(index)) ** 2).mean().item())


# ------------------------------------------------------------------------------------------------ contraction


def test_contraction_keeps_the_ball_and_holds_everything() -> None:
    points = (
        torch.randn(500, 3, dtype=torch.float64) * torch.logspace(-2, 3, 500, dtype=torch.float64)[:, None]
    )
    half = 1.5
    found, scales = reference.contract_gaussians(points, torch.ones(500).double(), half)
    assert ((found > 0) & (found < 1)).all()
    inside = points.norm(dim=-1) <= half
    torch.testing.assert_close(found[inside], points[inside] / (4 * half) + 0.5)
    torch.testing.assert_close(scales[inside], torch.full_like(scales[inside], 1 / (4 * half)))
    # Equation 10 of mip-NeRF 360, in its own words.
    x = points[~inside] / half
    r = x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found[~inside], ((2 - 1 / r) * (x / r)) / 4 + 0.5)


def test_a_gaussian_keeps_its_volume() -> None:
    points = torch.tensor([[0.3, -0.2, 0.4], [2.0, 1.0, -3.0], [0.0, 50.0, 0.0]], dtype=torch.float64)
    for point in points:
        jacobian = torch.autograd.functional.jacobian(
            lambda x: reference.contract_gaussians(x[None], torch.ones(1).double(), 1.5)[0][0], point
        )
        _, scale = reference.contract_gaussians(point[None], torch.ones(1).double(), 1.5)
        torch.testing.assert_close(scale[0] ** 3, torch.linalg.det(jacobian).abs(), rtol=1e-9, atol=0)


def test_the_contraction_has_gradients_everywhere() -> None:
    points = torch.tensor([[0.0, 0.0, 0.0], [1.5, 0.0, 0.0], [4.0, 2.0, 0.0]], requires_grad=True)
    found, scales = reference.contract_gaussians(points, torch.ones(3), 1.5)
    (found.sum() + scales.sum()).backward()
    assert points.grad is not None and torch.isfinite(points.grad).all()


# ------------------------------------------------------------------------------------------- the interlevel loss


def _bounds(t_vals: Tensor, proposal_t_vals: Tensor, weights: Tensor) -> Tensor:
    """The bound of every interval, by looking at every pair."""
    low, high = t_vals[:, :-1, None], t_vals[:, 1:, None]
    overlaps = (proposal_t_vals[:, None, :-1] < high) & (proposal_t_vals[:, None, 1:] > low)
    return (overlaps * weights[:, None]).sum(-1)


def test_the_interlevel_loss_is_its_definition() -> None:
    t_vals = torch.rand(20, 9, dtype=torch.float64).sort(-1).values
    proposal = torch.cat(
        [torch.zeros(20, 1), torch.rand(20, 5).sort(-1).values, torch.ones(20, 1)], -1
    ).double()
    weights = torch.rand(20, 8, dtype=torch.float64)
    given = (0.5 * torch.rand(20, 6, dtype=torch.float64)).requires_grad_()
    found = reference.interlevel_loss(t_vals, weights, proposal, given)
    missing = (weights - _bounds(t_vals, proposal, given)).clamp(min=0)
    wanted = (missing**2 / (weights + 1e-7)).sum(-1).mean()
    torch.testing.assert_close(found, wanted)
    assert found > 0
    torch.testing.assert_close(*(torch.autograd.grad(x, given)[0] for x in (found, wanted)))


def test_a_proposal_that_bounds_costs_nothing() -> None:
    t_vals = torch.linspace(0, 1, 9).expand(3, 9)
    weights = torch.rand(3, 8)
    assert reference.interlevel_loss(t_vals, weights, t_vals, weights) < 1e-10
    coarse = weights.unflatten(-1, (4, 2)).sum(-1)
    assert reference.interlevel_loss(t_vals, weights, t_vals[:, ::2], coarse) < 1e-10
    assert reference.interlevel_loss(t_vals, weights, t_vals, 0.5 * weights) > 0.01


# ---------------------------------------------------------------------------------------------------- the model


def test_the_switch_builds_the_other_model() -> None:
    config = _config(10)
    model = build_model(config.model)
    assert isinstance(model, ProposalModel)
    assert not {"densities", "masks"} & set(model.state_dict())
    assert from_dict(to_dict(config)) == config
    trainer = make_trainer(config, _spheres(16, 2))
    assert isinstance(trainer, ProposalTrainer) and isinstance(trainer.model, ProposalModel)
    assert rays_per_chunk(model, torch.device("cpu")) < 2**17
    with pytest.raises(InputError, match=r"FastConfig\.sampling"):
        dataclasses.replace(TINY, sampling="sphere")  # type: ignore[arg-type]


def test_the_gradient_of_a_step_is_that_of_the_reference() -> None:
    """Sums of some thousand float32 terms, in two orders: norm-wise to 1000 roundings."""
    dataset, found = _spheres(16, 4), {}
    for backend in ("native", "reference"):
        with use_backend(backend):
            trainer = ProposalTrainer(_config(10, batch_size=480), dataset)
            rays, target = trainer._engine.draw_rays(trainer.source, 1, 0, 40, True, 1.0)
            statistics = trainer._add_gradients(rays, target)
            found[backend] = (statistics.loss, dict(trainer._gradients))
    assert math.isclose(found["native"][0], found["reference"][0], rel_tol=1e-5)
    for name, gradient in found["native"][1].items():
        other = found["reference"][1][name]
        assert other.norm() > 0
        assert (gradient - other).norm() <= 1000 * 2.0**-23 * other.norm(), name


def test_it_learns_and_looks_where_matter_is() -> None:
    dataset = _spheres(32, 16)
    trainer = ProposalTrainer(_config(150), dataset)
    while not trainer.is_done:
        trainer.train_step()
    target = dataset.target(0)
    constant = -10 * math.log10(((target - target.mean((0, 1))) ** 2).mean().item())
    assert _psnr(trainer.model, dataset, 0) > constant + 4
    assert trainer.model.skipped_steps == 0
    # The central ray meets the sphere at t = 3: the fine fenceposts crowd there, unlike even ones (12 over [2, 6]).
    model = trainer.model
    assert isinstance(model, ProposalModel)
    centre = dataset.rays(0).map(lambda field: field[16, 16][None])
    with torch.no_grad():
        levels = model.levels(centre, torch.ones(1, 3))
    near_surface = ((levels.t_vals - 3.0).abs() < 0.25).sum()
    assert near_surface >= 4  # even ones would be 1 or 2


def test_products_in_tf32_learn_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colour and density networks whose products have operands rounded to TF32 (in plain PyTorch), and in float32."""
    dataset, found = _spheres(12, 20), {}
    for tf32 in (False, True):
        monkeypatch.setattr(ProposalModel, "uses_tf32", lambda _, rounds=tf32: rounds)
        trainer = ProposalTrainer(_config(150), dataset)
        while not trainer.is_done:
            trainer.train_step()
        found[tf32] = sum(_psnr(trainer.model, dataset, index) for index in range(len(dataset))) / len(
            dataset
        )
        assert trainer.model.skipped_steps == 0
    assert found[True] != found[False] and abs(found[True] - found[False]) < 0.2


def test_resuming_goes_on_bit_by_bit(tmp_path: Path) -> None:
    dataset, config = _spheres(24, 6), _config(8, batch_size=480)
    whole, first = ProposalTrainer(config, dataset), ProposalTrainer(config, dataset)
    for _ in range(5):
        first.train_step()
    path = tmp_path / "checkpoint.safetensors"
    first.save(path, None)
    second = ProposalTrainer(config, dataset, checkpoint=load_checkpoint(path))
    for trainer in (whole, second):
        while not trainer.is_done:
            trainer.train_step()
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    model = load_checkpoint(path).build_model()
    assert isinstance(model, ProposalModel)
    rays = dataset.rays(1)
    assert torch.equal(render_image(model, rays).rgb, first.model.render_rays(rays).rgb)


def _surrounded(size: int, count: int) -> Dataset:
    """The sphere of `_spheres` inside a patterned shell of radius 8, which no box of the fast model holds."""
    dataset = _spheres(size, count)
    pixels = []
    for index in range(count):
        rays = pinhole_rays(dataset.c2w[index], size, size, float(dataset.focal[index]))
        o, d = rays.origins, rays.directions
        a, b = (d * d).sum(-1), (o * d).sum(-1)
        t = (-b + torch.sqrt(b * b - a * ((o * o).sum(-1) - 64.0))) / a
        hit = (o + t[..., None] * d) / 8
        shell = 0.5 + 0.5 * torch.sin(4 * hit)
        image = dataset.pixels[dataset.offsets[index] : dataset.offsets[index + 1]].float() / 255
        over = image[:, :3] * image[:, 3:] + (1 - image[:, 3:]) * shell.reshape(-1, 3)
        pixels.append((255 * over).round().to(torch.uint8))
    return dataclasses.replace(dataset, pixels=torch.cat(pixels), far=torch.full((count,), 14.0))


def test_a_scene_beyond_the_box_needs_the_proposal() -> None:
    """The grid's box ends at 1.5, and what lies behind can only be painted on its walls: the proposal, which sees it
    where it is, halves the squared error at least (3 dB)."""
    train, test = _surrounded(24, 20), _surrounded(24, 5)
    found = {}
    for sampling, kind in (("proposal", ProposalTrainer), ("occupancy", FastTrainer)):
        model = dataclasses.replace(TINY, sampling=sampling, lindisp=True, proposal_samples=32)  # type: ignore[arg-type]
        trainer = kind(_config(240, model), train)
        while not trainer.is_done:
            trainer.train_step()
        found[sampling] = sum(_psnr(trainer.model, test, i) for i in range(len(test))) / len(test)
    assert found["proposal"] > found["occupancy"] + 3


def test_a_run_folder_is_that_of_any_model(tmp_path: Path) -> None:
    scene = str(write_scene(tmp_path / "scene"))
    config = _config(8, batch_size=480, print_every=4, save_every=8, test_every=8)
    result = run_training(scene, config, "fast", tmp_path / "run")
    assert result.step == 8 and result.test_psnr is not None


def test_query_reaches_beyond_the_box() -> None:
    model = build_model(TINY)
    points = torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]])
    rgb, density = model.query(points, torch.tensor([[0.0, 0.0, -1.0]] * 2), 0.01)
    assert (density > 0).all() and ((rgb > -0.01) & (rgb < 1.01)).all()
