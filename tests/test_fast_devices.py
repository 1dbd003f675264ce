"""The fast model's operators on every device there is: the CPU and, where torch sees one, the GPU.

Bounds as in test_fast_step.py: twice the float32 reference's distance from float64, plus a few units in the last place
of the largest value. On a GPU products are fused into sums, so positions may differ from the CPU's in their last bit:
points keep away from the faces of cells and rays are those that the device itself marched.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from rounding_bound import within_rounding
from test_fast_step import SMALL, _composed, _model, _rays, _source
from test_fast_training import _config, _psnr, _spheres
from torch import Tensor

from mipnerf_fast import ops, reference, use_backend
from mipnerf_fast.checkpoint import load_checkpoint
from mipnerf_fast.determinism import deterministic
from mipnerf_fast.fast_captured import READ_EVERY
from mipnerf_fast.fast_model import FastModel
from mipnerf_fast.fast_training import FastTrainer
from mipnerf_fast.ops.fast_step import (
    FastFields,
    FastGradients,
    MarchRays,
    NetworkGradients,
    PixelSource,
    StepStatistics,
    TableMoments,
)

FLOOR = 16 * 2.0**-23


def bounded(found: Tensor, rounded: Tensor, truth: Tensor) -> None:
    """The rule at the top of this file."""
    size = truth.abs().max().item() if truth.numel() else 0.0
    allowed = 2 * (rounded.cpu().double() - truth).abs().max().item() + FLOOR * max(size, 1e-30)
    assert (found.detach().cpu().double() - truth).abs().max().item() <= allowed


def moved(rays: MarchRays, device: torch.device) -> MarchRays:
    return MarchRays(*(None if field is None else field.to(device) for field in rays))  # type: ignore[arg-type]


def placed(fields: FastFields, device: torch.device) -> FastFields:
    return FastFields(*(value.to(device) if isinstance(value, Tensor) else value for value in fields))  # type: ignore[arg-type]


def stepped(
    rays: MarchRays, target: Tensor, fields: FastFields, loss_beta: float = 0.1
) -> tuple[StepStatistics, FastGradients]:
    """One training step, and the gradients that it adds to zeros."""
    values = (getattr(fields, name) for name in FastGradients._fields)
    gradients = FastGradients(
        *(None if v is None else torch.zeros_like(v, dtype=torch.float32) for v in values)  # type: ignore[arg-type]
    )
    return ops.fast_train_step(rays, target, loss_beta, fields, gradients), gradients


def test_hash_encode(device: torch.device) -> None:
    grid = reference.hash_grid(levels=4, coarsest=4, finest=50, table_size=2**9)
    points, scales = torch.rand(2000, 3), 0.001 + 0.02 * torch.rand(2000)
    for n in grid.resolutions:
        keep = ((points * n - (points * n).round()).abs() > 1e-3).all(-1)
        points, scales = points[keep], scales[keep]
    assert len(points) > 500
    tables, cotangent = torch.randn(grid.entries, 4), torch.randn(len(points), 16)
    results = []
    for backend, place, dtype in (
        ("native", device, torch.float32),
        ("reference", torch.device("cpu"), torch.float32),
        ("reference", torch.device("cpu"), torch.float64),
    ):
        leaves = [x.to(place, dtype, copy=True).requires_grad_() for x in (points, scales, tables)]
        with use_backend(backend):
            features = ops.hash_encode(*leaves, grid)
        (features * cotangent.to(place, dtype)).sum().backward()
        results.append([features.detach(), *(leaf.grad for leaf in leaves)])
    for found, rounded, truth in zip(*results, strict=True):
        assert found is not None and rounded is not None and truth is not None
        bounded(found, rounded, truth)


def test_gradients_of_the_encoding_have_the_same_bits_on_request(device: torch.device) -> None:
    grid = reference.hash_grid(levels=4, coarsest=4, finest=50, table_size=2**9)
    points, scales = torch.rand(20_000, 3, device=device), torch.full((20_000,), 0.01, device=device)
    tables = torch.randn(grid.entries, 2, device=device).requires_grad_()
    cotangent, found = torch.randn(20_000, 8, device=device), []
    for _ in range(5):
        with deterministic(), use_backend("native"):
            features = ops.hash_encode(points, scales, tables, grid)
            found.append(torch.autograd.grad(features, tables, cotangent)[0])
    assert all(torch.equal(found[0], other) for other in found[1:])
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = tables.detach().cpu().to(dtype).requires_grad_()
        with use_backend("native"):  # in float64 it is the reference
            features = ops.hash_encode(points.cpu().to(dtype), scales.cpu().to(dtype), leaf, grid)
        results.append(torch.autograd.grad(features, leaf, cotangent.cpu().to(dtype))[0])
    if device.type == "cpu":
        bounded(found[0], *results)
    else:  # positions, and with them the weights of corners, are products fused into differences there
        torch.testing.assert_close(found[0].cpu().double(), results[1], rtol=0, atol=1e-3)


def test_march_then_composite(device: torch.device) -> None:
    model, rays = _model(SMALL).to(device), moved(_rays(), device)
    with use_backend("native"):
        packed = ops.march(*rays[:6], model.masks, 32)  # type: ignore[arg-type]
    assert packed.ray_starts[0] == 0 and packed.ray_starts[-1] == len(packed.rays) > 0
    counts = packed.ray_starts[1:] - packed.ray_starts[:-1]
    assert torch.equal(packed.rays, torch.repeat_interleave(torch.arange(70, device=device), counts))
    means, scales = reference.sample_gaussians(
        *(field.double() for field in rays[:3]),
        packed.rays,
        packed.t0.double(),
        packed.t1.double(),
        1.5,  # type: ignore[arg-type, union-attr]
    )
    torch.testing.assert_close(packed.means.double(), means, rtol=0, atol=1e-6)
    torch.testing.assert_close(packed.scales.double(), scales, rtol=1e-5, atol=0)
    # Every sample's middle lies in a set cell of some mask: what is marched is occupied.
    assert 0 < len(packed.rays) < 70 * 750
    lengths, middles = packed.t1 - packed.t0, 0.5 * (packed.t0 + packed.t1)
    given = [torch.rand(len(lengths), 3, device=device), 30 * torch.rand_like(lengths), lengths, middles]
    given += [packed.ray_starts, rays.background, rays.near]
    results = []
    for backend, place, dtype in (
        ("native", device, torch.float32),
        ("reference", torch.device("cpu"), torch.float32),
        ("reference", torch.device("cpu"), torch.float64),
    ):
        arrays = [x.to(place, dtype, copy=True) if x.is_floating_point() else x.to(place) for x in given]
        leaves = [arrays[i].requires_grad_() for i in (0, 1, 2, 5)]
        with use_backend(backend):
            out = ops.packed_composite(*arrays)
        (out.rgb.square().sum() + out.distance.sum() + out.acc.sum() + out.weights.square().sum()).backward()
        results.append([*(x.detach() for x in out), *(leaf.grad for leaf in leaves)])
    for found, rounded, truth in zip(*results, strict=True):
        assert found is not None and rounded is not None and truth is not None
        bounded(found, rounded, truth)


def test_tiny_mlp(device: torch.device) -> None:
    shapes = {"in": (64, 36), "out": (16, 64), "colour": (64, 32), "hidden": (64, 64), "last": (3, 64)}
    weights = [torch.randn(shape) / math.sqrt(shape[1]) for shape in shapes.values()]
    features, harmonics, index = torch.randn(500, 35), torch.randn(20, 16), torch.randint(20, (500,))
    results = []
    for backend, place, dtype in (
        ("native", device, torch.float32),
        ("reference", torch.device("cpu"), torch.float32),
        ("reference", torch.device("cpu"), torch.float64),
    ):
        leaves = [x.to(place, dtype, copy=True).requires_grad_() for x in (features, harmonics, *weights)]
        with use_backend(backend):
            rgb, density = ops.tiny_mlp(leaves[0], leaves[1], index.to(place), *leaves[2:])
        (rgb.square().sum() + density.log().sum()).backward()
        results.append([rgb.detach(), density.detach(), *(leaf.grad for leaf in leaves)])
    for found, rounded, truth in zip(*results, strict=True):
        assert found is not None and rounded is not None and truth is not None
        bounded(found, rounded, truth)


def test_tiny_mlp_in_tf32(device: torch.device) -> None:
    """Or, where there is no such product, its refusal."""
    shapes = {"in": (64, 36), "out": (16, 64), "colour": (64, 32), "hidden": (64, 64), "last": (3, 64)}
    weights = [torch.randn(shape) / math.sqrt(shape[1]) for shape in shapes.values()]
    features, harmonics, index = torch.randn(500, 35), torch.randn(20, 16), torch.randint(20, (500,))

    def run(backend: str, place: torch.device, dtype: torch.dtype, tf32: bool) -> list[Tensor]:
        leaves = [x.to(place, dtype, copy=True).requires_grad_() for x in (features, harmonics, *weights)]
        with use_backend(backend):
            rgb, density = ops.tiny_mlp(leaves[0], leaves[1], index.to(place), *leaves[2:], tf32=tf32)
        (rgb.square().sum() + density.log().sum()).backward()
        return [x.detach() for x in (rgb, density, *(leaf.grad for leaf in leaves)) if x is not None]

    missing = ops.why_no_tf32(device)
    if missing:
        with pytest.raises(RuntimeError, match=re.escape(missing)):
            run("native", device, torch.float32, True)
        return
    cpu = torch.device("cpu")
    wanted = [
        run("reference", cpu, torch.float32, True),
        run("reference", cpu, torch.float64, True),
        run("reference", cpu, torch.float64, False),
    ]
    for found, *numbers in zip(run("native", device, torch.float32, True), *wanted, strict=True):
        within_rounding(found, *numbers)


def test_gradients_of_the_networks_have_the_same_bits_on_request(device: torch.device) -> None:
    shapes = {"in": (64, 36), "out": (16, 64), "colour": (64, 32), "hidden": (64, 64), "last": (3, 64)}
    weights = [torch.randn(shape, device=device) / math.sqrt(shape[1]) for shape in shapes.values()]
    features, harmonics = torch.randn(500, 35, device=device), torch.randn(3, 16, device=device)
    index, runs = torch.randint(3, (500,), device=device), []
    for wanted in (True, True, False):
        leaves = [x.clone().requires_grad_() for x in (features, harmonics, *weights)]
        with deterministic(wanted), use_backend("native"):
            rgb, density = ops.tiny_mlp(leaves[0], leaves[1], index, *leaves[2:])
            runs.append(torch.autograd.grad(rgb.square().sum() + density.log().sum(), leaves))
    first, second, plain = runs
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    size = plain[1].abs().max()
    assert (first[1] - plain[1]).abs().max() <= 500 * 2.0**-24 * size


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_step_and_render(device: torch.device, is_deterministic: bool) -> None:
    model, rays = _model(SMALL), _rays()
    target, wanted = torch.rand(70, 3), {}
    for dtype in (torch.float32, torch.float64):
        result, parameters = _composed(rays, model.fields(), dtype)
        torch.nn.functional.smooth_l1_loss(result.rgb, target.to(dtype), beta=0.1).backward()
        wanted[dtype] = result, {name: parameter.grad for name, parameter in parameters.items()}
    fields = model.to(device).fields()._replace(tf32=False)
    with deterministic(is_deterministic):
        _, again = stepped(moved(rays, device), target.to(device), fields)
        found, gradients = stepped(moved(rays, device), target.to(device), fields)
    assert not is_deterministic or torch.equal(gradients.tables, again.tables)
    for one, other in zip(gradients[1:], again[1:], strict=True):
        assert one is None or torch.equal(one, other)  # type: ignore[arg-type]
    rendered = ops.fast_render(moved(rays, device), fields)
    (rounded, rounded_grads), (truth, truth_grads) = wanted[torch.float32], wanted[torch.float64]
    for a, b, c in zip(rendered, rounded, truth, strict=False):
        bounded(a, b.detach(), c.detach())
    error = truth.rgb.detach() - target
    assert math.isclose(found.squared_error, error.square().mean().item(), rel_tol=1e-5)
    assert found.is_finite and 0 < found.counted <= found.samples
    for name, gradient in truth_grads.items():
        bounded(getattr(gradients, name), rounded_grads[name], gradient)


@pytest.mark.parametrize(("half", "tf32"), [(False, True), (True, False), (True, True)])
def test_step_and_render_that_round(device: torch.device, half: bool, tf32: bool) -> None:
    """Products to TF32, tables and features to float16; or, where there is no such thing, their refusal."""
    model, rays, target = _model(SMALL), _rays(), torch.rand(70, 3)
    with torch.no_grad():
        model.density_out[0] += 1.2
    fields = model.fields()
    if half:
        fields = fields._replace(tables=fields.tables.half())

    def composed(dtype: torch.dtype, fields: FastFields) -> list[Tensor]:
        result, parameters = _composed(rays, fields, dtype)
        loss = torch.nn.functional.smooth_l1_loss(result.rgb, target.to(dtype), beta=0.1)
        grads = torch.autograd.grad(loss, list(parameters.values()))
        return [x.detach() for x in (*result[:3], loss, *grads)]

    rounding = fields._replace(tf32=tf32)
    on_device, drawn, seen = placed(rounding, device), moved(rays, device), target.to(device)
    is_refused = half and device.type == "cpu"
    if is_refused or (tf32 and ops.why_no_tf32(device)):
        densities = model.densities.to(device)
        for run in (
            lambda: stepped(drawn, seen, on_device),
            lambda: ops.fast_render(drawn, on_device),
            lambda: ops.occupancy_update(densities, 0.01, 7, 48, 16, 0.5, 0.9, on_device),
        ):
            with pytest.raises(RuntimeError, match="tables must be" if is_refused else "tf32 must be"):
                run()
        return
    step, gradients = stepped(drawn, seen, on_device)
    rendered = ops.fast_render(drawn, on_device)
    found = [*rendered, torch.tensor(step.loss), *(grad for grad in gradients if grad is not None)]
    precise = fields._replace(tables=fields.tables.float())
    wanted = (
        composed(torch.float32, rounding),
        composed(torch.float64, rounding),
        composed(torch.float64, precise),
    )
    for one, *numbers in zip(found, *wanted, strict=True):
        within_rounding(one, *numbers)


def test_drawing(device: torch.device) -> None:
    source = _source()
    placed = PixelSource(*(tensor.to(device) for tensor in source))
    wanted, colours = ops.draw_rays(source, 11, 5, 500, True, 1.0)
    rays, target = ops.draw_rays(placed, 11, 5, 500, True, 1.0)
    assert rays.phase is not None and wanted.phase is not None
    for exact in ("phase", "background", "near", "far"):  # of the counters alone
        assert torch.equal(getattr(rays, exact).cpu(), getattr(wanted, exact))
    for a, b in ((rays.origins, wanted.origins), (rays.directions, wanted.directions), (target, colours)):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)


def test_adam(device: torch.device) -> None:
    state = [torch.randn(4100), torch.randn(4100), 0.1 * torch.randn(4100), 0.01 * torch.rand(4100)]
    state[1][torch.rand(4100) < 0.6] = 0
    wanted = reference.sparse_adam(*(x.double() for x in state), 1e-2, 0.9, 0.99, 1e-15, 7)
    placed = [x.to(device) for x in state]
    ops.sparse_adam(*placed, 1e-2, 0.9, 0.99, 1e-15, 7)
    for found, truth in zip((placed[0], placed[2], placed[3]), wanted, strict=True):
        torch.testing.assert_close(found.cpu().double(), truth, rtol=1e-6, atol=1e-7)
    assert not placed[1].any()


@pytest.mark.parametrize("count", [0, 300])
def test_a_step_that_moves_the_tables(device: torch.device, count: int) -> None:
    """It is the step, then Adam with its gradient: the bits say so."""
    model, rays = _model(SMALL).to(device), moved(_rays(count), device)
    fields, target = model.fields(), torch.rand(count, 3, device=device)
    with deterministic():
        wanted_statistics, wanted_gradients = stepped(rays, target, fields)
        wanted = [fields.tables.clone(), *torch.rand(2, *fields.tables.shape, device=device)]
        moments = TableMoments(*(moment.clone() for moment in wanted[1:]))
        ops.sparse_adam(wanted[0], wanted_gradients.tables, *wanted[1:], 1e-2, 0.9, 0.99, 1e-15, 3)
        zeros = (value if value is None else torch.zeros_like(value) for value in wanted_gradients[1:])
        gradients = NetworkGradients(*zeros)  # type: ignore[arg-type]
        before = fields.tables.clone()
        found = ops.fast_train_update(
            rays, target, 0.1, fields, gradients, moments, 1e-2, 0.9, 0.99, 1e-15, 3
        )
    assert found == wanted_statistics
    assert all(map(torch.equal, (fields.tables, *moments), wanted))
    assert torch.equal(fields.tables, before) == (count == 0)
    for mine, other in zip(gradients, wanted_gradients[1:], strict=True):
        assert mine is other is None or torch.equal(mine, other)


def test_occupancy(device: torch.device) -> None:
    model = _model(SMALL).to(device)
    before = model.densities.cpu().clone()
    share, threshold = ops.occupancy_update(model.densities, 0.01, 7, 48, 16, 0.5, 0.9, model.fields())
    cells = model.densities.cpu()
    changed = (cells != before).sum().item()
    assert 32**3 / 16 <= changed <= 2 * 32**3 / 16
    assert math.isclose(threshold, reference.occupancy_threshold(cells.double(), 0.9).item(), rel_tol=1e-5)
    masks = reference.occupancy_masks(cells, threshold)
    assert torch.equal(model.masks.cpu(), reference.pack_masks(masks))
    assert share == masks[0][0].double().mean().item()


def test_training(device: torch.device) -> None:
    """The whole step; on a GPU in a captured graph, whose pace and reading back are the trainer's business."""
    scene = _spheres(12, 20)
    trainer = FastTrainer(dataclasses.replace(_config(8 * READ_EVERY)), scene, device)
    before = _psnr_on(trainer.model, scene, device)
    results = []
    while not trainer.is_done:
        trainer.launch_step()
        results += trainer.results()
    results += trainer.results(wait=True)
    assert [result.step for result in results] == list(range(1, 8 * READ_EVERY + 1))
    assert all(math.isfinite(result.loss) and result.rays > 0 for result in results)
    assert trainer.step == 8 * READ_EVERY and int(trainer.model.skipped_steps) == 0
    assert 0.5 <= float(trainer.model.samples_per_ray) < 750
    assert _psnr_on(trainer.model, scene, device) > before + 3
    assert all(value.device.type == device.type for value in trainer.moments()["exp_avg"].values())


def test_deterministic_runs_and_their_resume_are_the_same(device: torch.device, tmp_path: Path) -> None:
    """Bit by bit: two whole runs, and one in three parts whose statistics are read after every step."""
    scene, config = _spheres(12, 12), _config(3 * READ_EVERY + 5, deterministic=True)
    path = tmp_path / "checkpoint.safetensors"

    def state(trainer: FastTrainer) -> dict[str, Tensor]:
        moments = trainer.moments().items()
        of_adam = {f"{moment}.{name}": x for moment, tensors in moments for name, x in tensors.items()}
        return {name: x.cpu().clone() for name, x in (trainer.model.state_dict() | of_adam).items()}

    with deterministic():
        whole = []
        for _ in range(2):
            trainer = FastTrainer(config, scene, device)
            while not trainer.is_done:
                trainer.launch_step()
            losses = [(result.step, result.loss, result.rays) for result in trainer.results(wait=True)]
            whole.append((state(trainer), losses))
        trainer, losses = FastTrainer(config, scene, device), []
        for stop in (7, READ_EVERY + 13, config.max_steps):
            while trainer.step < stop:
                result = trainer.train_step()
                losses.append((result.step, result.loss, result.rays))
            trainer.save(path, None)
            trainer = FastTrainer(config, scene, device, checkpoint=load_checkpoint(path))
    for found, heard in (whole[1], (state(trainer), losses)):
        assert heard == whole[0][1] and len(heard) == config.max_steps
        for name, value in whole[0][0].items():
            assert torch.equal(value, found[name]), name


def _psnr_on(model: FastModel, scene: object, device: torch.device) -> float:
    """On the CPU, whatever the model was trained on."""
    copy = FastModel(model.config)
    copy.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    return _psnr(copy, scene, 0)  # type: ignore[arg-type]


class StandIn:
    """In place of the captured graph: steps whose statistics say their number; the 20th is not finite."""

    def __init__(self) -> None:
        self.history = torch.full((READ_EVERY, 6), math.nan, dtype=torch.float64)
        self.done, self.renewed = 0, 0

    def __call__(self, rate: float) -> None:
        self.done += 1
        row = [self.done, rate, 10.0, 5.0, float(self.done != 20), 64.0]
        self.history[(self.done - 1) % READ_EVERY] = torch.tensor(row, dtype=torch.float64)

    def update_occupancy(self, *settings: float) -> None:
        self.renewed += 1


def test_results_of_captured_steps_come_in_their_order() -> None:
    trainer, captured = FastTrainer(_config(100), _spheres(8, 4)), StandIn()
    trainer._captured = captured  # type: ignore[assignment]
    results = []
    for step in range(1, 41):
        trainer.launch_step()
        arrived = trainer.results()
        assert len(arrived) == (READ_EVERY if step % READ_EVERY == 0 else 0)
        results += arrived
    results += trainer.results(wait=True)
    assert [(r.step, r.loss, r.rays) for r in results] == [(k, k, 64) for k in range(1, 41)]
    assert [r.rate == r.mse for r in results] == [True] * 40 and results[0].rate < results[30].rate
    assert [r.step for r in results if r.is_skipped] == [20]
    assert [r.skips for r in results] == [0] * 19 + [1] * 21 and results[19].failures_in_row == 1
    assert trainer.samples == 400 and captured.renewed == 3
    assert trainer.train_step().step == 41
