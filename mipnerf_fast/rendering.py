"""Rendering: rays to pictures with a trained model, and camera paths to files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .camera_paths import Camera
from .cameras import Rays
from .config import FastConfig, MipNerfConfig
from .cpu_setup import free_memory
from .errors import InputError
from .model import MipNerf, Model
from .ops import keeping_weights
from .pictures import Picture, Video, VideoUnavailableError, colour_map, to_uint8, write_png
from .progress import Progress
from .rendering_modes import Deviation, check_mode, render_rays_fast

KINDS = ("rgb", "depth", "opacity", "normals")
FRAMES_PER_SECOND = 30.0

# Rays per chunk, by the memory that the activations of a chunk may take. Small on a CPU: larger chunks leave its
# caches and are slower.
_CPU_BYTES = 128 * 2**20
_GPU_SHARE = 0.25
_MAX_CHUNK = 2**17


class Rendering(NamedTuple):
    """A rendered picture, in the leading shape of its rays.

    rgb: [..., 3], unclipped. distance: [...], t of the un-normalised direction, so depth along the view axis.
    acc: [...], opacity.
    """

    rgb: Tensor
    distance: Tensor
    acc: Tensor


def rays_per_chunk(model: Model, device: torch.device) -> int:
    """How many rays to render at once so that the activations fit: a power of two, at least 64.

    Counted per sample: the features three times over (encoding and its temporaries) and three layers' outputs; less
    where the network's engine needs less.
    """
    config = model.config
    if isinstance(config, FastConfig) and config.sampling == "proposal":
        samples, features = config.proposal_samples + config.num_samples, config.levels * config.features
    elif isinstance(config, FastConfig):
        # Groups of rays are fused: only the rays themselves and their colours take memory.
        return _MAX_CHUNK
    elif isinstance(config, MipNerfConfig):
        samples = config.num_samples
        features = 6 * (config.max_deg_point - config.min_deg_point)
    else:
        samples = config.num_coarse + config.num_fine
        features = 3 + 6 * config.max_deg_point
    bytes_per_ray = 4 * samples * (3 * features + 3 * config.net_width)
    budget = float(_CPU_BYTES)
    if device.type == "cuda":
        budget = _GPU_SHARE * free_memory(device)
        if isinstance(model, MipNerf) and model.mlp.feature_dtype is not None:
            # Engines with 16-bit operands keep no layer of a whole chunk: 16-bit features, once more while they are
            # made, and a dozen floats for outputs, densities and weights.
            bytes_per_ray = samples * (4 * features + 48)
    count = max(64, min(_MAX_CHUNK, int(budget / bytes_per_ray)))
    return 1 << (count.bit_length() - 1)


@torch.no_grad()
def render_image(
    model: Model,
    rays: Rays,
    white_background: bool = True,
    chunk_rays: int | None = None,
    progress: Callable[[int], None] | None = None,
    mode: str = "exact",
) -> Rendering:
    """Render rays with the finest level of a model, deterministically and without gradients.

    Args:
        model: on any device; the rays are moved there chunk by chunk.
        rays: of any leading shape, [H, W, .] for a picture.
        white_background: white or black behind everything.
        chunk_rays: rays at once; None: by memory (`rays_per_chunk`). The result does not depend on it but for
            rounding.
        progress: called with the number of rays done, after each chunk.
        mode: "exact", or "fast": see `rendering_modes.render_rays_fast`.

    Returns:
        Rendering on the model's device, in the leading shape of rays.

    Errors: ValueError for chunk_rays below 1; InputError for a mode that the model does not have.

    Example:
        >>> model = MipNerf(MipNerfConfig(num_samples=8, net_depth=2, net_width=16))
        >>> rays = cameras.pinhole_rays(torch.eye(4)[:3], height=4, width=6, focal=5.0)
        >>> render_image(model, rays).rgb.shape
        torch.Size([4, 6, 3])

    Source: algorithm 1.11.
    """
    like = next(model.parameters())
    if chunk_rays is None:
        chunk_rays = rays_per_chunk(model, like.device)
    if chunk_rays < 1:
        raise ValueError(f"render_image: chunk_rays must be at least 1, got {chunk_rays}")
    check_mode(model, mode)
    shape, flat = rays.batch_shape, rays.flatten()
    count = flat.origins.shape[0]
    parts = []
    with keeping_weights(model):
        for start in range(0, count, chunk_rays):
            stop = min(start + chunk_rays, count)
            chunk = Rays(*(field[start:stop].to(like) for field in flat))
            if mode == "fast" and isinstance(model, MipNerf):
                level = render_rays_fast(model, chunk, white_background)
            else:
                level = model.render_rays(chunk, white_background)
            parts.append(Rendering(level.rgb, level.distance, level.acc))
            if progress is not None:
                progress(stop - start)
    if not parts:
        empty = like.new_zeros(*shape)
        return Rendering(like.new_zeros(*shape, 3), empty, empty)
    rgb, distance, acc = (torch.cat(fields) for fields in zip(*parts, strict=True))
    return Rendering(rgb.reshape(*shape, 3), distance.reshape(shape), acc.reshape(shape))


def add_deviation(
    deviation: Deviation,
    model: Model,
    rays: Rays,
    rgb: Tensor,
    white_background: bool,
    chunk_rays: int | None = None,
) -> None:
    """Compare a picture rendered in the fast mode with the exact one, on the subset that the deviation names.

    Args:
        deviation: of all pictures together; this one is added.
        rays: of the picture, any leading shape.
        rgb: as the fast mode rendered it, [..., 3].
        model, white_background, chunk_rays: as it was rendered.
    """
    flat = rays.flatten()
    subset = deviation.subset(flat.origins.shape[0])
    chosen = Rays(*(field[subset.to(field.device)] for field in flat))
    exact = render_image(model, chosen, white_background, chunk_rays)
    deviation.add(rgb.reshape(-1, 3)[subset.to(rgb.device)], exact.rgb)


def normals_from_distance(rays: Rays, distance: Tensor) -> Tensor:
    """World-space unit normals of the surface o + t d, facing the camera.

    The cross product of the differences between a pixel's vertical and its horizontal neighbours (one-sided at the
    edges).

    Args:
        rays: [H, W, .], H and W at least 2.
        distance: [H, W], t.

    Returns:
        [H, W, 3].
    """
    if min(distance.shape) < 2:
        raise ValueError(f"normals_from_distance: need at least 2 x 2 pixels, got {list(distance.shape)}")
    points = (rays.origins + rays.directions * distance[..., None]).double()
    down, right = torch.gradient(points, dim=(0, 1))
    normals = torch.nn.functional.normalize(torch.linalg.cross(down, right), dim=-1)
    towards = -(normals * rays.directions).sum(-1, keepdim=True)
    return torch.where(towards < 0, -normals, normals).to(distance)


class DistanceRange(NamedTuple):
    """What the two ends of the colour map stand for, as fractions of the way from near to far."""

    low: float
    high: float


def distance_range(camera: Camera, rendering: Rendering) -> DistanceRange:
    """Ends that hold the visible surface of a view (acc > 1/2), with a margin; 0 and 1 where there is none."""
    seen = rendering.distance[rendering.acc > 0.5]
    if seen.numel() == 0:
        return DistanceRange(0.0, 1.0)
    seen = (seen.float() - camera.near) / max(camera.far - camera.near, 1e-9)
    low, high = (float(seen.quantile(q)) for q in (0.01, 0.99))
    margin = 0.1 * (high - low) + 0.01
    return DistanceRange(low - margin, high + margin)


def picture(kind: str, camera: Camera, rays: Rays, rendering: Rendering, ends: DistanceRange) -> Picture:
    """One kind of picture of a view, uint8 [H, W, 3].

    rgb: the colours. depth: turbo from near (blue) to far (red). normals: 0.5 + 0.5 n in world axes. Both over
    white by opacity. opacity: grey, 0 black.
    """
    acc = rendering.acc.cpu().clamp(0, 1)[..., None]
    if kind == "rgb":
        return to_uint8(rendering.rgb)
    if kind == "opacity":
        return to_uint8(acc.expand(*acc.shape[:-1], 3))
    if kind == "depth":
        fraction = (rendering.distance.cpu() - camera.near) / max(camera.far - camera.near, 1e-9)
        colours = colour_map((fraction - ends.low) / (ends.high - ends.low))
    elif kind == "normals":
        colours = 0.5 + 0.5 * normals_from_distance(rays, rendering.distance.to(rays.origins).cpu())
    else:
        raise ValueError(f"picture: unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    return to_uint8(colours * acc + (1 - acc))


def render_path(
    model: Model,
    cameras: Sequence[Camera],
    folder: Path,
    *,
    kinds: Sequence[str] = KINDS,
    white_background: bool = True,
    chunk_rays: int | None = None,
    frames_per_second: float = FRAMES_PER_SECOND,
    mode: str = "exact",
) -> list[str]:
    """Render a camera path to `folder/<kind>/<frame>.png` and `folder/<kind>.mp4`.

    Everything is written to `<folder>.partial`, where the frames can be watched, and takes the folder's place when
    complete. The depth colours keep the range of the first frame, relative to near and far.

    Args:
        model: a trained model.
        cameras: of the path, at least one.
        folder: replaced when it exists.
        kinds: some of `KINDS`.
        white_background: white or black behind the colours.
        chunk_rays: see `render_image`.
        frames_per_second: of the videos.
        mode: "exact", or "fast": then the result says how far from exact.

    Returns:
        One sentence per thing written or skipped, and in the fast mode its deviation.

    Errors: InputError for bad arguments; OSError where the folder cannot be written.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(f"--kinds: expected some of {', '.join(KINDS)}, got {' '.join(unknown) or 'none'}")
    check_mode(model, mode)
    if not frames_per_second > 0:
        raise InputError(f"--fps: must be positive, got {frames_per_second}")
    if min(min(camera.height, camera.width) for camera in cameras) < 2 and "normals" in kinds:
        raise InputError("--kinds: normals need pictures of at least 2 x 2 pixels")
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)

    sizes = {(camera.height, camera.width) for camera in cameras}
    skipped = "the views differ in size" if len(sizes) > 1 else ""
    videos = {kind: Video(partial / f"{kind}.mp4", frames_per_second) for kind in kinds if not skipped}
    ends = None
    total = sum(camera.height * camera.width for camera in cameras)
    deviation = Deviation(total)
    try:
        with Progress(f"rendering {folder.name}", total, "rays") as progress:
            for index, camera in enumerate(cameras):
                rays = camera.rays()
                rendering = render_image(model, rays, white_background, chunk_rays, progress, mode)
                if mode == "fast":
                    add_deviation(deviation, model, rays, rendering.rgb, white_background, chunk_rays)
                ends = ends or distance_range(camera, rendering)
                for kind in kinds:
                    frame = picture(kind, camera, rays, rendering, ends)
                    write_png(partial / kind / f"{index:04d}.png", frame)
                    if not skipped:
                        try:
                            videos[kind].add(frame)
                        except VideoUnavailableError as error:
                            skipped = str(error)
    finally:
        for video in videos.values():
            video.close()
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    lines = [f"{len(cameras)} frames each: {', '.join(str(folder / kind) for kind in kinds)}"]
    if mode == "fast":
        lines.append(str(deviation))
    if skipped:
        return [*lines, f"mp4 skipped: {skipped}"]
    return lines + [f"video: {folder / kind}.mp4" for kind in kinds]
