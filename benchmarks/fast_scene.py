"""The rays and the model that the benchmarks of the fast model's operations share."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Inputs
from mipnerf_fast import FastConfig, FastModel, ops, reference
from mipnerf_fast.cameras import pinhole_rays
from mipnerf_fast.ops.fast_step import FastFields, MarchRays

WIDTH, FOCAL = 200, 277.8  # of the Blender scenes at a quarter of their size


def model(seed: int = 0) -> FastModel:
    """The model for images of 200 x 200, its tables as large as training makes them, around a ball of matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = FastModel(FastConfig().for_images(WIDTH))
        torch.nn.init.uniform_(made.tables, -0.5, 0.5)
    cells = made.config.occupancy_resolution
    axis = (torch.arange(cells) + 0.5) / cells - 0.5
    radius = torch.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    made.masks.copy_(reference.pack_masks(reference.occupancy_masks((radius < 0.2).float(), 0.5)))
    made.scale_range.copy_(torch.tensor([5e-4, 2e-2]))
    return made


def in_float32(of: FastModel, device: torch.device) -> FastFields:
    """The model as it is, on a device; products in float32 on a GPU too."""
    fields = of.fields()._asdict()
    moved = {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}
    return FastFields(**fields | moved)._replace(tf32=False)


def as_on_gpu(of: FastModel, device: torch.device) -> FastFields:
    """The model as a GPU trains and renders it: tables in float16, products in TF32 where there are any."""
    fields = in_float32(of, device)
    return fields._replace(tables=fields.tables.to(torch.float16), tf32=not ops.why_no_tf32(device))


def for_reference(fields: FastFields) -> FastFields:
    """The same for the operators in plain PyTorch, which compute in the precision of the tables: float16 as float32."""
    return fields._replace(tables=fields.tables.to(torch.float32))


def rays(seed: int, count: int) -> Inputs:
    """Random pixels of a camera four units away that looks at the ball: origins, ..., background, target."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0)
    right = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]), position)
    right = right / right.norm()
    up = torch.linalg.cross(position, right)
    camera = torch.stack([right, up, position, 4 * position], -1)
    flat = pinhole_rays(camera, WIDTH, WIDTH, FOCAL).flatten()
    chosen = torch.randint(WIDTH * WIDTH, (count,), generator=generator)
    drawn = {
        name: getattr(flat, name)[chosen].contiguous()
        for name in ("origins", "directions", "radii", "near", "far")
    }
    return drawn | {
        "phase": torch.rand(count, 1, generator=generator),
        "background": torch.rand(count, 3, generator=generator),
        "target": torch.rand(count, 3, generator=generator),
    }


def march_rays(inputs: Inputs) -> MarchRays:
    """Of the inputs."""
    return MarchRays(*(inputs[name] for name in MarchRays._fields))


def samples(inputs: Inputs, of: FastModel) -> reference.PackedSamples:
    """The samples of the rays."""
    return reference.fast_samples(*march_rays(inputs)[:6], of.fields())


def double(tensors: Inputs) -> Inputs:
    """The same in float64; integers as they are."""
    return {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}


def differentiable(tensors: Inputs, names: tuple[str, ...]) -> list[Tensor]:
    """Fresh leaves of the named tensors."""
    return [tensors[name].detach().requires_grad_() for name in names]
