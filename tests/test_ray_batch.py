"""The kernel that makes a training batch: the pixels, rays and colours of the plain PyTorch path, on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import harness
from cuda_emulation.harness import EmulationError
from torch import Tensor

from mipnerf_fast import ops, use_backend
from mipnerf_fast.cameras import Rays
from mipnerf_fast.counter_rng import FAST_RAYS, counter_uint32
from mipnerf_fast.data import Dataset, RayBatches
from mipnerf_fast.ops.fast_step import PixelSource
from mipnerf_fast.ops.ray_batch import PosedImages, ray_batch

SIZES = {
    "one size": [(8, 12)] * 5,
    "many sizes": [(8, 12), (1, 1), (16, 10), (3, 7), (6, 4)],
    "multi-scale": [(16, 12), (8, 6), (4, 3), (16, 12), (8, 6), (4, 3)],
}
NAMES = (*Rays._fields, "target")
SEEDS = range(20)
STEP = 2**33 + 5


def images(sizes: str = "multi-scale", channels: int = 4, background: str = "white") -> Dataset:
    """Noise, seen by cameras of which no two share a number."""
    generator = np.random.default_rng(len(sizes) + channels)
    heights, widths = (torch.tensor(x) for x in zip(*SIZES[sizes], strict=True))
    count, n = int((heights * widths).sum()), len(heights)
    near = torch.from_numpy(generator.uniform(1, 2, n).astype(np.float32))
    return Dataset(
        pixels=torch.from_numpy(generator.integers(0, 256, (count, channels), dtype=np.uint8)),
        height=heights,
        width=widths,
        c2w=torch.from_numpy(generator.normal(size=(n, 3, 4)).astype(np.float32)),
        focal=torch.from_numpy(generator.uniform(5, 50, n)),
        near=near,
        far=near + 4,
        lossmult=4.0 ** torch.arange(n),
        scale=torch.ones(n, dtype=torch.int64),
        names=[str(i) for i in range(n)],
        split="train",
        background=background,
    )


def named(batch: tuple[Rays, Tensor]) -> dict[str, Tensor]:
    return dict(zip(NAMES, (*batch[0], batch[1]), strict=True))


@pytest.mark.parametrize("mode", ["all_images", "single_image"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("channels", "background", "count", "seed", "step"),
    [
        (4, "white", 257, 20200823, 3),
        (4, "black", 1, 2**64 - 1, 0),
        (3, "white", 1031, 2**63, STEP),
        (3, "black", 0, 0, 1),
    ],
)
def test_the_kernel_draws_what_torch_draws(
    device: torch.device,
    mode: str,
    sizes: str,
    channels: int,
    background: str,
    count: int,
    seed: int,
    step: int,
) -> None:
    batches = RayBatches(images(sizes, channels, background), device, mode)
    with use_backend("native"):
        found = named(batches.draw(seed, step, count))
    with use_backend("reference"):
        wanted = named(batches.draw(seed, step, count))
    on_cpu = device.type == "cpu"
    for name in NAMES:
        assert found[name].shape == wanted[name].shape
        assert found[name].is_contiguous()
        # What is copied is the same. What is computed is on the CPU the same too but for the norm of a direction: its
        # products are fused into sums here, and in torch where the processor can. It has at most 3 + 5 roundings of
        # the square, halved by the root, one of each root and one of each quotient: 8 of 2^-24. On a GPU the kernel
        # fuses everywhere; as many roundings of the largest number again.
        ulps = (
            0 if name in ("origins", "near", "far", "lossmult") else 4 * (name == "viewdirs") if on_cpu else 8
        )
        size = float(wanted[name].abs().max()) if count else 0.0
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=ulps * 2.0**-23 * size)


def test_the_step_is_read_on_the_device(device: torch.device) -> None:
    batches = RayBatches(images(), device)
    step = torch.tensor(STEP, device=device)
    assert torch.equal(batches.draw(1, step, 64)[1], batches.draw(1, STEP, 64)[1])
    assert not torch.equal(batches.draw(1, step + 2**32, 64)[1], batches.draw(1, STEP, 64)[1])


def exact_ray(
    c2w: np.ndarray, focal: np.ndarray, height: Any, width: Any, pixel: Any
) -> dict[str, np.ndarray]:
    """Directions and radii in float32, every operation rounded by itself and in the order of the kernels."""
    half, column, row = np.float32(0.5), np.float32(pixel % width), np.float32(pixel // width)
    x = (column + half - half * np.float32(width)) / focal
    y = -(row + half - half * np.float32(height)) / focal
    directions = c2w[:, :, 0] * x[:, None] + c2w[:, :, 1] * y[:, None] - c2w[:, :, 2]
    squares = c2w[:, :, 1] * c2w[:, :, 1]
    length = np.sqrt(squares[:, 0] + squares[:, 1] + squares[:, 2])
    return {"directions": directions, "radii": (length / focal * np.float32(1 / np.sqrt(3)))[:, None]}


def test_the_rays_of_both_models_are_these_numbers_on_the_cpu() -> None:
    """So that a change of the formula they share, or of how it is compiled, does not go unseen."""
    data, count = images("many sizes"), 500
    batches = RayBatches(data)
    with use_backend("reference"):
        image, pixel = (x.numpy() for x in batches.choose(7, 5, count))
    places = (data.height.numpy()[image], data.width.numpy()[image], pixel)
    found = named(batches.draw(7, 5, count))
    for name, wanted in exact_ray(data.c2w.numpy()[image], np.float32(data.focal)[image], *places).items():
        np.testing.assert_array_equal(found[name].numpy(), wanted)

    order, ends, shares = torch.arange(len(data)), torch.tensor([len(data)]), torch.tensor([1.0])
    source = PixelSource(
        data.pixels,
        data.offsets,
        data.height,
        data.width,
        data.c2w,
        data.focal.float(),
        data.near,
        data.far,
        order,
        ends,
        shares,
    )
    rays, _ = ops.draw_rays(source, 7, 5, count, False, 1.0)
    words = counter_uint32(7, 5, FAST_RAYS, torch.arange(count), 3).numpy()
    image = words[:, 1] * len(data) >> 32
    height, width = data.height.numpy()[image], data.width.numpy()[image]
    fast = exact_ray(
        data.c2w.numpy()[image],
        np.float32(data.focal)[image],
        height,
        width,
        words[:, 2] * (height * width) >> 32,
    )
    for name, wanted in fast.items():
        np.testing.assert_array_equal(getattr(rays, name).numpy(), wanted)


# -------------------------------------------------------------------------------------------------- the operator


def call(device: torch.device | str = "cpu", **changes: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    batches = RayBatches(images(), device)
    known = {"step": torch.tensor(1, device=device), "count": 5, **changes}
    arguments = [known.pop(name, value) for name, value in (("step", None), ("count", None))]
    posed = batches._images._replace(**known)
    return ray_batch(posed, 0, *arguments, False, True)


def test_wrong_arguments_of_the_operator_are_named() -> None:
    some = images()
    pixels = some.pixels
    for changes, message in (
        ({"pixels": pixels[:, 0]}, r"pixels must be of shape \[P, 3 or 4\], got \[504\]"),
        ({"pixels": pixels[:, :2]}, "pixels must be of 3 or 4 channels, got 2"),
        ({"pixels": pixels.float()}, "pixels must be .*, got float32"),
        ({"pixels": pixels[:0]}, r"pixels must be 1 to 2\^40 - 1 pixels, got 0"),
        ({"offsets": some.offsets[1:]}, r"offsets must be of shape \[7\] \(\[n \+ 1\]\), got \[6\]"),
        ({"heights": some.height.int()}, "heights must be .*, got Int"),
        ({"heights": some.height[:0]}, "heights must be of at least one image, got 0"),
        ({"widths": some.width[1:]}, r"widths must be of shape \[6\]"),
        ({"c2w": some.c2w.double()}, "c2w must be float32, got float64"),
        ({"c2w": some.c2w[:, :, :3]}, r"c2w must be of shape \[6, 3, 4\]"),
        ({"focals": some.focal}, "focals must be float32, got float64"),
        ({"nears": some.near[0]}, r"nears must be of shape \[6\]"),
        ({"lossmults": some.lossmult.half()}, "lossmults must be float32, got float16"),
        ({"common_size": 7}, "common_size must be 0 or the 504 pixels / the 6 images, got 7"),
        ({"step": torch.tensor([1])}, r"step must be of shape \[\]"),
        ({"step": torch.tensor(1.0)}, "step must be .*, got float32"),
        ({"count": -1}, "count must be 0 or more, got -1"),
    ):
        with pytest.raises(RuntimeError, match=f"ray_batch: {message}"):
            call(**changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has one device")
def test_arrays_on_two_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="ray_batch: offsets must be on cuda:0 as c2w, got cpu"):
        call("cuda", offsets=images().offsets)


def test_views_are_taken_as_they_are(device: torch.device) -> None:
    some = images()
    (_, direct, *_), target = call(device)
    wide = torch.cat([some.pixels, some.pixels], 1).to(device)[:, :4]
    four = torch.stack([some.c2w, some.c2w]).to(device).transpose(0, 1)[:, 0]
    (_, found, *_), colours = call(device, pixels=wide, c2w=four)
    assert torch.equal(direct, found) and torch.equal(target, colours)


def test_the_schema_and_the_shapes_are_right(device: torch.device) -> None:
    posed: PosedImages = RayBatches(images(), device)._images
    *tensors, common_size = posed
    step = torch.tensor(3, device=device)
    arguments = (*tensors, 11, step, 7, False, common_size, True)
    torch.library.opcheck(torch.ops.mipnerf_fast.ray_batch.default, arguments)


def test_a_derivative_is_refused() -> None:
    c2w = images().c2w.requires_grad_()
    (_, directions, *_), _ = call(c2w=c2w)
    with pytest.raises(RuntimeError, match="ray_batch: the native kernel has no derivative"):
        directions.sum().backward()


# ------------------------------------------------------------------------------------------------- the CUDA kernel


def emulate(
    sizes: str, channels: int, mode: str, count: int, seed: int = 0, fault: int = 0, **options: Any
) -> Callable[[], None]:
    """Runs the emulated kernel; the result compares it with the CPU's, which is compiled from the same formulas."""
    data = images(sizes, channels)
    batches = RayBatches(data, mode=mode)
    wanted = named(batches.draw(11, STEP, count))
    *tensors, common_size = batches._images
    arrays = dict(zip(PosedImages._fields, (tensor.numpy() for tensor in tensors), strict=False))
    scalars = {"single_image": int(mode == "single_image"), "common_size": common_size}
    found = harness.run(
        "ray_batch",
        {**arrays, "step": np.array([STEP])},
        {name: (tuple(field.shape), np.float32) for name, field in wanted.items()},
        {"seed": 11, "white_background": 1, "fault": fault, **scalars},
        seed,
        **options,
    )

    def compare() -> None:
        for name, field in wanted.items():
            np.testing.assert_array_equal(found[name], field.numpy(), err_msg=name)

    return compare


@pytest.mark.parametrize(
    ("sizes", "channels", "mode", "count"),
    [
        ("one size", 4, "all_images", 200),
        ("multi-scale", 3, "all_images", 131),
        ("one size", 3, "single_image", 65),
        ("many sizes", 4, "single_image", 64),
        ("many sizes", 4, "all_images", 1),
        ("many sizes", 4, "all_images", 0),
    ],
)
def test_the_cuda_kernel_gives_the_same_numbers(sizes: str, channels: int, mode: str, count: int) -> None:
    emulate(sizes, channels, mode, count)()


def test_the_sound_kernel_passes_for_every_seed() -> None:
    for seed in SEEDS:
        emulate("many sizes", 4, "all_images", 70, seed)()


@pytest.mark.parametrize(
    ("fault", "check", "sentence"),
    [
        (1, "memory", "AddressSanitizer"),
        (2, "races", "race: .* of the array"),
        (3, "values", "target|origins"),
    ],
)
def test_a_broken_kernel_is_caught_for_every_seed(fault: int, check: str, sentence: str) -> None:
    for seed in SEEDS:
        if check == "values":
            with pytest.raises(AssertionError, match=sentence):
                emulate("many sizes", 4, "all_images", 70, seed, fault, checks=["memory"])()
        else:
            with pytest.raises(EmulationError, match=sentence):
                emulate("many sizes", 4, "all_images", 70, seed, fault, checks=[check])
