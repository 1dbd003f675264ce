"""Random batches: the right rays and colours, every pixel equally often, nothing but (seed, step) deciding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scenes import write_blender

from mipnerf_fast.data import Dataset, RayBatches, load_dataset, multiscale

SIZES = {"train": [(8, 12), (6, 4), (16, 10)]}


@pytest.fixture(params=["one size", "many sizes", "multi-scale"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """Three kinds of data set that index differently."""
    many = request.param == "many sizes"
    write_blender(tmp_path / "scene", sizes=SIZES if many else {"train": [(8, 12)] * 3})
    if request.param != "multi-scale":
        return load_dataset(tmp_path / "scene")
    return load_dataset(multiscale.convert(tmp_path / "scene", tmp_path / "multi", levels=3, progress=False))


def _all_pixels(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = (dataset.height * dataset.width).tolist()
    image = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    return image, torch.cat([torch.arange(size) for size in sizes])


@pytest.mark.parametrize("background", ["white", "black"])
def test_rays_and_colours_of_pixels_are_those_of_the_images(
    dataset: Dataset, background: str, device: torch.device
) -> None:
    dataset.background = background
    rays, target = RayBatches(dataset, device).gather(*(x.to(device) for x in _all_pixels(dataset)))
    for field, got in enumerate(rays):
        want = torch.cat([dataset.rays(i, device).flatten()[field] for i in range(len(dataset))])
        # directions are sums of three products, in whatever order: three roundings of numbers of at most 2
        torch.testing.assert_close(got, want, rtol=0, atol=3 * 2.0**-23)
    want = torch.cat([dataset.target(i, device).reshape(-1, 3) for i in range(len(dataset))])
    torch.testing.assert_close(target, want, rtol=0, atol=0)


def _which(
    dataset: Dataset, batches: RayBatches, target: torch.Tensor, rays_origin: torch.Tensor
) -> torch.Tensor:
    """The flat pixel index of each drawn ray, by its colour and its camera (noise images: no two agree)."""
    image, pixel = _all_pixels(dataset)
    rays, colours = batches.gather(image, pixel)
    keys = torch.cat([colours, rays.origins, rays.lossmult], -1)
    table = {tuple(row): k for k, row in enumerate(keys.tolist())}
    assert len(table) == len(keys)
    return torch.tensor([table[tuple(row)] for row in torch.cat([target, rays_origin], -1).tolist()])


def test_every_pixel_is_drawn_equally_often(dataset: Dataset) -> None:
    batches = RayBatches(dataset)
    total = dataset.pixels.shape[0]
    counts = torch.zeros(total)
    per_pixel, steps = 50, 20
    for step in range(steps):
        rays, target = batches.draw(seed=3, step=step, num_rays=total * per_pixel // steps)
        found = _which(dataset, batches, target, torch.cat([rays.origins, rays.lossmult], -1))
        counts += torch.bincount(found, minlength=total)
    mean = total * per_pixel // steps * steps / total
    # chi-square of `total` cells: mean total - 1, standard deviation sqrt(2 total); 5 deviations either way
    statistic = float(((counts - mean) ** 2 / mean).sum())
    assert abs(statistic - (total - 1)) < 5 * (2 * total) ** 0.5
    assert float(counts.min()) > 0


def test_single_image_mode_draws_from_one_image_a_step_and_from_all_in_time(dataset: Dataset) -> None:
    batches = RayBatches(dataset, mode="single_image")
    seen: set[int] = set()
    covered = torch.zeros(dataset.pixels.shape[0], dtype=torch.bool)
    for step in range(80):
        rays, target = batches.draw(seed=0, step=step, num_rays=400)
        found = _which(dataset, batches, target, torch.cat([rays.origins, rays.lossmult], -1))
        image = torch.searchsorted(dataset.offsets, found, right=True) - 1
        assert int(image.min()) == int(image.max())
        seen.add(int(image[0]))
        covered[found] = True
    assert seen == set(range(len(dataset)))
    assert bool(covered.all())


@pytest.mark.parametrize("mode", ["all_images", "single_image"])
def test_seed_and_step_alone_decide(dataset: Dataset, mode: str) -> None:
    a, b = RayBatches(dataset, mode=mode), RayBatches(dataset, mode=mode)
    first = a.draw(5, 7, 64)[1]
    a.draw(5, 8, 64)
    torch.testing.assert_close(b.draw(5, 7, 64)[1], first, rtol=0, atol=0)
    torch.testing.assert_close(a.draw(5, torch.tensor(7), 64)[1], first, rtol=0, atol=0)
    torch.testing.assert_close(a.draw(5, 7, 16)[1], first[:16], rtol=0, atol=0)
    assert not torch.equal(a.draw(5, 8, 64)[1], first)
    assert not torch.equal(a.draw(6, 7, 64)[1], first)


def test_nothing_of_the_size_of_all_rays_is_kept(dataset: Dataset) -> None:
    batches = RayBatches(dataset)
    held = [value for value in vars(batches).values() if isinstance(value, torch.Tensor)]
    floats = [value for value in held if value.dtype != torch.uint8]
    assert batches.pixels.dtype == torch.uint8
    assert sum(value.numel() for value in floats) <= 20 * len(dataset) + 1


def test_unknown_mode_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="mode is 'some'; expected one of all_images, single_image"):
        RayBatches(dataset, mode="some")


def test_no_rays_is_a_batch_too(dataset: Dataset) -> None:
    for mode in ("all_images", "single_image"):
        rays, target = RayBatches(dataset, mode=mode).draw(0, 0, 0)
        assert rays.batch_shape == (0,)
        assert target.shape == (0, 3)
