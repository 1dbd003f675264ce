"""The exact mode of rendering is the model's own finest level; the fast mode is within what it leaves out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from analytic_models import Ball
from tiny_scenes import dataset, orbit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mipnerf_fast import (
    Composite,
    InputError,
    MipNerf,
    MipNerfConfig,
    NerfConfig,
    Rays,
    build_model,
    cameras,
    ops,
    use_backend,
)
from mipnerf_fast.camera_paths import camera_path
from mipnerf_fast.evaluation import evaluate
from mipnerf_fast.model import Model
from mipnerf_fast.reference import Activations
from mipnerf_fast.rendering import render_image, render_path
from mipnerf_fast.rendering_modes import NEGLIGIBLE, SUBSET, Deviation, check_mode, render_rays_fast

TINY = MipNerfConfig(num_samples=20, max_deg_point=6, net_depth=3, net_width=16, net_width_condition=8)
MODELS = {
    "mipnerf": TINY,
    "three levels": dataclasses.replace(TINY, num_levels=3),
    "bf16 operands": dataclasses.replace(
        TINY, max_deg_point=4, net_depth=4, mlp_backend="emulated", mlp_dtype="bf16"
    ),
    "one level": dataclasses.replace(TINY, num_levels=1),
    "separate networks": dataclasses.replace(TINY, separate_mlps=True),
    "no view directions, skip before the heads": dataclasses.replace(TINY, use_viewdirs=False, skip_layer=2),
    "nerf": NerfConfig(
        num_coarse=8, num_fine=8, max_deg_point=4, net_depth=3, net_width=16, net_width_condition=8
    ),
}


def view(size: int = 12) -> Rays:
    return cameras.pinhole_rays(orbit(1)[0, :3].float(), size, size, 12.0)


def built(name: str, device: torch.device) -> Model:
    """One of MODELS; on a GPU "emulated" is what it emulates."""
    config = MODELS[name]
    if isinstance(config, MipNerfConfig) and config.mlp_backend == "emulated" and device.type == "cuda":
        config = dataclasses.replace(config, mlp_backend="cublaslt")
    return build_model(config).to(device)


def foggy(
    config: MipNerfConfig = TINY, seed: int = 2, device: torch.device | str = "cpu", bias: float = -60
) -> MipNerf:
    """A model in float64 whose density swings from nothing to opaque along and between rays."""
    torch.manual_seed(seed)
    model = MipNerf(config).double().to(device)
    for mlp in model.mlps:
        density = mlp.linears[config.net_depth]
        with torch.no_grad():
            density.weight *= 400
            density.bias += bias
    return model


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_the_exact_mode_is_the_finest_level_bit_by_bit(name: str, backend: str, device: torch.device) -> None:
    model = built(name, device)
    with use_backend(backend), torch.no_grad():
        want = model(view().map(lambda field: field.to(device)))[-1]
        got = render_image(model, view(), chunk_rays=10_000)
    for field in ("rgb", "distance", "acc"):
        assert torch.equal(getattr(got, field), getattr(want, field))


def test_coarse_levels_compute_densities_alone(device: torch.device) -> None:
    model = built("three levels", device)
    with (
        mock.patch.object(model.mlp, "forward", wraps=model.mlp.forward) as whole,
        mock.patch.object(model.mlp, "density", wraps=model.mlp.density) as density,
    ):
        render_image(model, view(), chunk_rays=10_000)
    assert whole.call_count == 1
    assert density.call_count == 2


@pytest.mark.parametrize("white", [True, False])
@pytest.mark.parametrize("levels", [1, 2])
def test_the_fast_mode_leaves_out_only_what_is_negligible(
    levels: int, white: bool, device: torch.device
) -> None:
    """Colours are within [-padding, 1 + padding] and so is the background: light left out moves one by no more."""
    model = foggy(dataclasses.replace(TINY, num_levels=levels), device=device)
    rays = view(24).flatten().map(lambda field: field.to(device).double())
    seen: list[int] = []

    def counting(t_vals: Tensor, part: Rays, white_background: bool) -> Composite:
        seen.append(t_vals.shape[0])
        return MipNerf.pixels(model, t_vals, part, white_background)

    with torch.no_grad():
        exact = model.render_rays(rays, white)
        _, opacity = model.propose(rays)
        with mock.patch.object(model, "pixels", counting):
            fast = render_rays_fast(model, rays, white)
    skipped = torch.zeros_like(exact.acc, dtype=torch.bool) if opacity is None else opacity < NEGLIGIBLE
    assert seen[0] == int((~skipped).sum())
    # Rays ended early, but not all; where there is a coarse level, some were skipped.
    assert 0 < seen[-1] < seen[0]
    assert bool(skipped.any()) == (levels == 2)
    assert bool((~skipped).any())
    left_out = torch.where(skipped, exact.acc, torch.full_like(exact.acc, NEGLIGIBLE))
    bound = (1 + 2 * TINY.rgb_padding) * left_out + 1e-12
    assert bool(((fast.rgb - exact.rgb).abs() <= bound[:, None]).all())
    assert bool(((fast.acc - exact.acc).abs() <= left_out + 1e-12).all())
    # Not the same computation under another name.
    assert bool((fast.acc < exact.acc - 1e-9).any())
    assert bool((fast.distance >= 2).all() and (fast.distance <= 6).all())
    empty = rays.near[skipped, 0]
    assert torch.equal(fast.distance[skipped], empty)
    # A mean of t within [2, 6] over all but a share NEGLIGIBLE of the weight moves by at most that share of 4.
    solid = exact.acc > 0.5
    assert bool(((fast.distance - exact.distance).abs()[solid] <= 4 * 2 * NEGLIGIBLE).all())


class Questions(TorchDispatchMode):
    """Counts the operations whose result the host needs before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:])
        )
        self.count += by_mask or name in ("nonzero", "masked_select", "_local_scalar_dense")
        return func(*args, **(kwargs or {}))


def test_the_fast_mode_asks_the_device_three_times(device: torch.device) -> None:
    """Which rays are not empty, and which go on after half and three quarters of their samples."""
    model = foggy(device=device)
    rays = view(24).flatten().map(lambda field: field.to(device).double())
    with Questions() as asked:
        render_rays_fast(model, rays)
    assert asked.count == 3
    with Questions() as asked:
        model.render_rays(rays)
    assert asked.count == 0


def test_the_fast_mode_takes_the_kernel_from_rays_to_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it serves groups of so many samples; here it is made of its parts."""
    model = foggy()
    rays = view(24).flatten().map(lambda field: field.double())
    wanted = render_rays_fast(model, rays)
    groups: list[int] = []

    def composited(
        self: ops.MipMLP,
        frusta: ops.Frusta,
        encoding: ops.Encoding,
        viewdirs_enc: Tensor | None,
        white_background: bool,
        activations: Activations,
    ) -> Composite:
        t_vals, origins, directions, radii = frusta
        groups.append(t_vals.shape[1] - 1)
        features = ops.frustum_ipe(t_vals, origins, directions, radii, encoding.min_deg, encoding.max_deg)
        raw = self(features, viewdirs_enc)
        return ops.composite(*raw, t_vals, directions, white_background, **activations)

    monkeypatch.setattr(
        ops.MipMLP, "composites", lambda self, samples, density_alone=False: not density_alone
    )
    monkeypatch.setattr(ops.MipMLP, "composited", composited)
    found = render_rays_fast(model, rays)
    assert groups == [10, 5, 5]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("samples", [1, 2, 3, 7])
def test_few_samples_are_decided_about_as_often_as_they_can_be(samples: int) -> None:
    model = foggy(dataclasses.replace(TINY, num_samples=samples), bias=-20)
    rays = view(24).flatten().map(lambda field: field.double())
    with torch.no_grad():
        exact = model.render_rays(rays)
        _, opacity = model.propose(rays)
    fast = render_rays_fast(model, rays)
    assert opacity is not None
    left_out = torch.where(opacity < NEGLIGIBLE, exact.acc, torch.full_like(exact.acc, NEGLIGIBLE))
    assert bool(((fast.acc - exact.acc).abs() <= left_out + 1e-12).all())
    assert float(exact.acc.max()) > 0.5


def test_the_fast_mode_does_not_depend_on_the_chunks(device: torch.device) -> None:
    model, rays = foggy(device=device), view().map(lambda field: field.double())
    whole = render_image(model, rays, mode="fast")
    parts = render_image(model, rays, chunk_rays=7, mode="fast")
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_view_without_anything_in_it_is_background(device: torch.device) -> None:
    model = foggy(device=device)
    with torch.no_grad():
        model.mlp.linears[TINY.net_depth].bias -= 1e4
    rays = view().map(lambda field: field.double())
    rendering = render_image(model, rays, mode="fast")
    assert bool((rendering.rgb == 1).all())
    assert bool((rendering.acc == 0).all())
    assert torch.equal(rendering.distance.cpu(), rays.near[..., 0])


def test_deviation_counts_what_it_compares() -> None:
    deviation = Deviation(total=10 * SUBSET)
    assert deviation.stride == 10
    subset = deviation.subset(35)
    assert subset.tolist() == [5, 15, 25]
    exact = torch.zeros(3, 3)
    deviation.add(exact + 0.1, exact)
    assert deviation.psnr == pytest.approx(20.0, abs=1e-5)  # float32 of 0.1: off by 2^-27
    deviation.add(torch.tensor([[0.0, -0.5, 0.0]]), torch.zeros(1, 3))
    assert deviation.largest == 0.5
    assert deviation.rays == 4
    assert "on 4 of 40,960 rays (one in 10" in str(deviation)
    assert "0.5" in str(deviation)
    # What another process has compared counts as if it had been compared here.
    other = Deviation(total=10 * SUBSET)
    other.add(torch.tensor([[0.0, 0.75, 0.0]]), torch.zeros(1, 3))
    squares = deviation.squares
    deviation.include(other)
    assert (deviation.rays, deviation.largest) == (5, 0.75)
    assert deviation.squares == squares + 0.75**2
    same = Deviation(total=5)
    assert same.subset(5).tolist() == [0, 1, 2, 3, 4]
    same.add(exact, exact)
    assert same.psnr == math.inf
    same.add(torch.full((1, 3), math.nan), torch.zeros(1, 3))
    same.add(exact, exact)
    same.include(other)
    assert math.isnan(same.largest)
    assert math.isnan(same.psnr)


def test_models_without_the_mode_say_so() -> None:
    check_mode(build_model(TINY), "fast")
    with pytest.raises(InputError, match=r"--mode: fast is for mip-NeRF.*Nerf"):
        check_mode(build_model(MODELS["nerf"]), "fast")
    with pytest.raises(InputError, match=r"--mode: expected one of exact, fast, got 'quick'"):
        render_image(build_model(TINY), view(), mode="quick")


def test_the_error_is_of_the_pictures_that_were_written(tmp_path: Path, device: torch.device) -> None:
    model = foggy(device=device).float()
    data = dataset([24, 24], [1, 1], Ball())
    lines = render_path(model, camera_path("test", data), tmp_path / "test", kinds=["rgb"], mode="fast")
    told = next(line for line in lines if line.startswith("fast mode:"))
    assert "on 1,152 of 1,152 rays (one in 1," in told
    squares, largest = 0.0, 0.0
    for i in range(2):
        a, b = (render_image(model, data.rays(i), mode=mode).rgb.double() for mode in ("fast", "exact"))
        squares += float(((a - b) ** 2).sum())
        largest = max(largest, float((a - b).abs().max()))
    assert largest > 0
    assert f"{-10 * math.log10(squares / (3 * 1152)):.2f} dB" in told
    assert f"largest difference {largest:.2g}" in told
    exact = render_path(model, camera_path("test", data), tmp_path / "exact", kinds=["rgb"])
    assert not any("fast mode" in line for line in exact)


def test_an_evaluation_tells_its_mode() -> None:
    model, data = foggy().float(), dataset([24], [1], Ball())
    exact, fast = (evaluate(model, data, mode=mode) for mode in ("exact", "fast"))
    assert exact.run["mode"] == "exact"
    assert "fast mode" not in exact.caption()
    assert fast.run["mode"].startswith("fast mode: ")
    assert "dB PSNR against the exact mode" in fast.caption()
    with pytest.raises(InputError, match="--mode"):
        evaluate(build_model(MODELS["nerf"]), data, mode="fast")
