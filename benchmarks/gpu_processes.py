"""What stages of gpu_check.py run in a process of their own: every kernel once, a training, profiles.

python benchmarks/gpu_processes.py touch-kernels | train FOLDER | profile FOLDER [PRESET]
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def touch_kernels(device_name: str = "cuda") -> int:
    """Launch every kernel of both models on small shapes, forward and backward: what the sanitizer watches."""
    import torch

    from benchmarks.bench_train import ENGINES, engine_names, random_images
    from mipnerf_fast import MipNerf, MipNerfConfig, cameras
    from mipnerf_fast.data.ray_batches import MODES, RayBatches

    device = torch.device(device_name)
    for mode in MODES:
        RayBatches(random_images(3, 20), device, mode).draw(0, torch.tensor(1, device=device), 33)
    generator = torch.Generator(device).manual_seed(0)
    rays = cameras.pinhole_rays(torch.eye(4)[:3], 5, 7, 8.0).flatten().map(lambda field: field.to(device))
    # Those in float16 too, which nobody would train with.
    engines = (*ENGINES, ("cublaslt", "fp16"), ("fused", "fp16"))
    fused = set()
    for samples, width in ((33, 64), (33, 128), (128, 256)):
        base = MipNerfConfig(
            num_samples=samples, net_depth=6, net_width=width, net_width_condition=width // 2
        )
        for engine, dtype, name, why_not in engine_names(MipNerf(base).mlp, device, engines):
            if why_not:
                print(f"{name}: not run: {why_not}")
                continue
            if engine == "fused":
                fused.add((width, dtype))
            config = dataclasses.replace(base, mlp_backend=engine, mlp_dtype=dtype)
            model = MipNerf(config).to(device)
            loss = sum(level.rgb.square().mean() for level in model(rays, True, True, generator))
            assert isinstance(loss, torch.Tensor)
            loss.backward()
            with torch.no_grad():
                model.render_rays(rays)
            print(f"{name}, {samples} samples, width {width}: loss {loss.item():.4f}")
    for width, dtype in sorted(fused):
        touch_fused(device, width, dtype)
    touch_operators(device)
    touch_fast_kernels(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0


def touch_fused(device: torch.device, width: int, dtype: str) -> None:
    """What no model asks of the fused network: gradients to the features, and sums in whatever order."""
    import torch

    from mipnerf_fast import ops
    from mipnerf_fast.ops import mlp_fused
    from mipnerf_fast.ops.mlp_autograd import Architecture

    operands = ops.MLP_DTYPES[dtype]
    assert operands is not None
    for views in (27, None):
        shape = ops.MlpShape(
            view_features=views, net_depth=6, net_width=width, net_width_condition=width // 2
        )
        parameters = list(ops.MipMLP(*shape).to(device).parameters())
        architecture = Architecture(
            shape.net_depth, shape.net_depth_condition if views else 0, shape.skip_layer
        )
        directions = None if views is None else torch.rand(5, views, device=device)
        for is_deterministic in (True, False):
            for to_features in (True, False):
                features = torch.rand(5, 70, shape.in_features, device=device, requires_grad=to_features)
                rgb, density = mlp_fused.fused_mlp(
                    features, directions, parameters, architecture, operands, deterministic=is_deterministic
                )
                (rgb.square().mean() + density.square().mean()).backward()
    print(f"fused {dtype}, width {width}: gradients to features, sums in any order")


def touch_operators(device: torch.device) -> None:
    """The operators by themselves, with gradients to everything, in every dtype, with and without fixed orders."""
    import torch

    from mipnerf_fast import FastConfig, FastModel, cameras, ops, reference, use_backend
    from mipnerf_fast.counter_rng import counter_uniform
    from mipnerf_fast.determinism import deterministic

    generator = torch.Generator(device).manual_seed(1)

    def rand(*shape: int, wants: bool = True) -> torch.Tensor:
        return torch.rand(*shape, device=device, generator=generator).requires_grad_(wants)

    def back(*outputs: torch.Tensor) -> None:
        torch.stack([output.float().square().sum() for output in outputs]).sum().backward()

    camera = torch.eye(4)[:3]
    camera[2, 3] = 4.0
    rays = cameras.pinhole_rays(camera, 5, 7, 8.0).flatten().map(lambda field: field.to(device))
    t_vals = torch.linspace(2, 6, 34, device=device).repeat(35, 1)
    on_gpu = device.type == "cuda"
    with use_backend("native"):
        counter_uniform(1, torch.tensor(2, device=device), 3, torch.arange(70, device=device), 5)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            t, o, d, r = (
                x.clone().requires_grad_() for x in (t_vals, rays.origins, rays.directions, rays.radii)
            )
            back(ops.frustum_ipe(t, o, d, r, out_dtype=dtype))
            rgb, density = (rand(35, 33, n, wants=False).to(dtype).requires_grad_() for n in (3, 1))
            level = ops.composite(rgb, density, t, d)
            back(*level)
            ops.resample(t.detach(), level.weights.detach())
            ops.composite_resample(rgb, density, t.detach(), d.detach())
        # Every cell of its occupancy grid counts as occupied.
        model = FastModel(FastConfig().for_images(20)).to(device)
        grid, tables = model.grid, model.tables
        for kind in ("gaussian", "erf", "none"):
            for is_deterministic in (False, True):
                with deterministic(is_deterministic):
                    back(ops.hash_encode(rand(70, 3), 0.01 * rand(70), tables, grid, kind))
        ops.occupancy_masks(torch.ones_like(model.densities), 0.5, model.masks)
        cones = (rays.origins, rays.directions, rays.radii, rays.near, rays.far, rand(35, 1, wants=False))
        found = ops.march(*cones, model.masks, model.config.occupancy_resolution)
        samples, encoded = found.t0.shape[0], len(grid.resolutions) * tables.shape[1]
        hidden = model.density_in.shape[0]
        for has_hidden in (False, True):
            for tf32 in (False, True) if on_gpu and not ops.why_no_tf32(device) else (False,):
                for is_deterministic in (False, True):
                    with deterministic(is_deterministic):
                        networks = ops.tiny_mlp(
                            rand(samples, encoded),
                            reference.spherical_harmonics(rays.viewdirs).requires_grad_(),
                            found.rays,
                            model.density_in,
                            model.density_out,
                            model.colour_in,
                            rand(hidden, hidden) if has_hidden else None,
                            model.colour_out,
                            tf32=tf32,
                        )
                        back(*networks)
        rgb, density = (x.detach().requires_grad_() for x in networks)
        lengths = (found.t1 - found.t0).requires_grad_()
        middles = 0.5 * (found.t0 + found.t1)
        back(
            *ops.packed_composite(
                rgb, density, lengths, middles, found.ray_starts, rand(35, 3), rays.near.contiguous()
            )
        )
    print(f"operators one by one: {samples} samples")


def touch_fast_kernels(device: torch.device) -> None:
    """The fast model's: steps as trained in every precision, queries, rendering, steps by themselves."""
    import torch

    from benchmarks.bench_train import random_images
    from mipnerf_fast import ops, preset
    from mipnerf_fast.config import FastConfig
    from mipnerf_fast.determinism import deterministic
    from mipnerf_fast.fast_training import UPDATE_EVERY, FastTrainer
    from mipnerf_fast.ops.fast_step import FastGradients, NetworkGradients, TableMoments

    images = random_images(3, 20)
    base = preset("fast")
    assert isinstance(base.model, FastConfig)
    on_gpu = device.type == "cuda"
    has_tf32 = on_gpu and torch.cuda.get_device_capability(device)[0] >= 8
    for dtype in ("fp32", "tf32") if has_tf32 else ("fp32",):
        sized = dataclasses.replace(base.model.for_images(20), mlp_dtype=dtype)
        for is_deterministic in (False, True):
            config = dataclasses.replace(
                base, model=sized, batch_size=1024, deterministic=is_deterministic, capture=False
            )
            with deterministic(is_deterministic):
                trainer = FastTrainer(config, images, device)
                for _ in range(UPDATE_EVERY + 1):  # so that the occupancy grid is renewed too
                    loss = trainer.train_step().loss
            print(f"fast model, {dtype}, deterministic {is_deterministic}: loss {loss:.4f}")
        trainer.model.eval().query(torch.rand(70, 3, device=device), torch.rand(70, 3, device=device), 0.01)
        (rays, target), fields = ops.draw_rays(trainer.source, 0, 1, 70, True, 1.0), trainer.model.fields()
        ops.fast_render(rays, fields)
        buffers = (getattr(fields, name) for name in FastGradients._fields)
        gradients = FastGradients(*(None if like is None else torch.zeros_like(like) for like in buffers))  # type: ignore[arg-type]
        ops.fast_train_step(rays, target, 0.1, fields, gradients)
        moments = TableMoments(torch.zeros_like(fields.tables), torch.zeros_like(fields.tables))
        ops.fast_train_update(
            rays, target, 0.1, fields, NetworkGradients(*gradients[1:]), moments, 1e-2, 0.9, 0.99, 1e-15, 1
        )


def train_multiscale(
    scratch: Path,
    minutes: float = 1.5,
    device: str = "cuda",
    name: str = "paper",
    source: str = "demo",
    levels: int = 4,
) -> int:
    """Train on the built-in scene at several scales and evaluate: training.json, run/. 1 if nothing was learned."""
    import torch

    from mipnerf_fast import preset
    from mipnerf_fast.checkpoint import load_model
    from mipnerf_fast.data import load_dataset, multiscale
    from mipnerf_fast.evaluation import evaluate, terminal_table
    from mipnerf_fast.training import run_training

    data = multiscale.convert(source, scratch / "scene", 1, levels)
    config = dataclasses.replace(preset(name), test_every=0, save_every=100_000)
    result = run_training(str(data), config, name, scratch / "run", max_minutes=minutes, device=device)
    model, _, checkpoint = load_model(scratch / "run", torch.device(device))
    start = time.monotonic()
    evaluation = evaluate(
        model.eval(), load_dataset(str(data), "test"), steps=checkpoint.step, seconds=checkpoint.seconds
    )
    found = {
        "steps": result.step,
        "training_seconds": result.seconds,
        "rays_per_second": result.step * config.batch_size / result.seconds,
        "evaluation_seconds": time.monotonic() - start,
        "evaluation": evaluation.to_dict(),
    }
    (scratch / "training.json").write_text(json.dumps(found))
    print(terminal_table(evaluation))
    return int(not has_learned(evaluation.mean().psnr))


def has_learned(psnr: float | None) -> bool:
    """Whether a network is trained: half a minute of a GPU gets past this, one that learns nothing stays below."""
    return psnr is not None and psnr >= 20


def profile_steps(
    scratch: Path, name: str = "paper", device: str = "cuda", steps: int = 32, warm_up: int = 0
) -> int:
    """The kernels of a preset's step by their time: profile_NAME.json.

    The exact model's step is launched one kernel at a time and then replayed from its graph; the fast model's is
    replayed.

    Args:
        steps: in the profile. warm_up: before it; 0: until the step is recorded and more, of the fast model until its
            occupancy grid is no longer that of the first steps.
    """
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.bench_train import random_images
    from mipnerf_fast import preset
    from mipnerf_fast.config import FastConfig
    from mipnerf_fast.data.procedural import demo_scene
    from mipnerf_fast.training import make_trainer

    on_gpu = device.startswith("cuda")
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    base = preset(name)
    is_fast = isinstance(base.model, FastConfig)
    if isinstance(base.model, FastConfig):
        # Images that a grid can settle on, of the size that the design is for.
        images = demo_scene("train", size=800 if on_gpu else 25, views=12, supersample=1)
        base = dataclasses.replace(base, model=base.model.for_images(int(images.width.max())))
    else:
        images = random_images(100, 400 if on_gpu else 50)

    def microseconds(row: Any) -> float:
        return float(row.self_device_time_total if on_gpu else row.self_cpu_time_total)

    found: dict[str, Any] = {}
    for captured in (True,) if is_fast else (False, True):
        trainer = make_trainer(dataclasses.replace(base, capture=captured), images, device)
        for _ in range(warm_up or (1000 if is_fast else 10)):
            trainer.launch_step()
        trainer.results(wait=True)
        start = time.perf_counter()
        with profile(activities=[activity]) as trace:
            for _ in range(steps):
                trainer.launch_step()
            trainer.results(wait=True)
        wall = time.perf_counter() - start
        kernels = [row for row in trace.key_averages() if microseconds(row) > 0]
        busy = sum(map(microseconds, kernels)) * 1e-6
        rows = [
            {
                "kernel": row.key[:160],
                "launches_a_step": row.count / steps,
                "milliseconds_a_step": microseconds(row) / steps * 1e-3,
                "share": microseconds(row) * 1e-6 / max(busy, 1e-12),
            }
            for row in sorted(kernels, key=microseconds, reverse=True)[:40]
        ]
        found["captured" if captured else "launched"] = {
            "milliseconds_a_step_while_profiled": wall / steps * 1e3,
            "milliseconds_a_step_on_the_gpu": busy / steps * 1e3,
            "kernels": rows,
        }
        (scratch / f"profile_{name}.json").write_text(json.dumps(found))
        for row in rows[:15]:
            print(f"{row['milliseconds_a_step']:9.3f} ms {row['share']:6.1%}  {row['kernel']}")
        del trainer
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The one that is named."""
    name, *more = sys.argv[1:] if argv is None else argv
    if name == "touch-kernels":
        return touch_kernels()
    folder, preset = Path(more[0]), (*more[1:], "paper")[0]
    return train_multiscale(folder) if name == "train" else profile_steps(folder, preset)


if __name__ == "__main__":
    sys.exit(main())
