"""The fast model's training: it learns, resumes bit by bit, gains from scale awareness, and lives in a run folder."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_runs import write_scene

from mipnerf_fast import FastConfig, FastModel, InputError, _native, ops, preset, use_backend
from mipnerf_fast.cameras import pinhole_rays
from mipnerf_fast.checkpoint import load_checkpoint
from mipnerf_fast.config import TrainConfig, from_dict, to_dict
from mipnerf_fast.data import Dataset
from mipnerf_fast.fast_training import FastTrainer
from mipnerf_fast.rendering import render_image
from mipnerf_fast.training import run_training

TINY = FastConfig(levels=4, finest_resolution=48, log2_table_size=13, occupancy_resolution=32, net_width=32)


def _config(steps: int, model: FastConfig = TINY, **changes: object) -> TrainConfig:
    fast = dataclasses.replace(preset("fast"), model=model, max_steps=steps, lr_delay_steps=20)
    return dataclasses.replace(fast, **{"batch_size": 2048, **changes})  # type: ignore[arg-type]


def _spheres(size: int, count: int, levels: int = 1) -> Dataset:
    """Views around a chequered sphere on a transparent background, and their pyramid, finest first."""
    pixels, heights, cameras, focals = [], [], [], []
    for i in range(count):
        azimuth, height = 2.4 * i, 1 - 2 * (i + 0.5) / count
        level = math.sqrt(1 - height * height)
        back = torch.tensor([level * math.cos(azimuth), level * math.sin(azimuth), height])
        right = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]), back)
        right = right / right.norm()
        up = torch.linalg.cross(back, right)
        c2w = torch.stack([right, up, back, 4 * back], -1)
        rays = pinhole_rays(c2w, 2 * size, 2 * size, 2.8 * size)
        # |o + t d|^2 = 1
        o, d = rays.origins, rays.directions
        a, b = (d * d).sum(-1), (o * d).sum(-1)
        under = b * b - a * 15.0
        hit = o + (-b - under.clamp(min=0).sqrt())[..., None] / a[..., None] * d
        dark = (torch.floor(4 * hit).sum(-1) % 2)[..., None]
        colour = dark * torch.tensor([0.1, 0.2, 0.5]) + (1 - dark) * (0.5 + 0.4 * hit)
        image = torch.cat([colour, (under > 0).float()[..., None]], -1)
        for j in range(levels):
            image = image.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).mean((1, 3))
            pixels.append((255 * image.clamp(0, 1)).to(torch.uint8).reshape(-1, 4))
            heights.append(image.shape[0])
            cameras.append(c2w)
            focals.append(1.4 * size / 2**j)
    n, sizes = len(heights), torch.tensor(heights)
    one = torch.ones(n)
    return Dataset(
        torch.cat(pixels),
        sizes,
        sizes.clone(),
        torch.stack(cameras),
        torch.tensor(focals, dtype=torch.float64),
        2 * one,
        6 * one,
        one,
        torch.tensor([2**j for j in range(levels)] * count),
        [f"{i}" for i in range(n)],
        "train",
        "white",
    )


@pytest.fixture(scope="module")
def demo() -> Dataset:
    return _spheres(40, 20)


def _psnr(model: FastModel, dataset: Dataset, index: int) -> float:
    rgb = model.render_rays(dataset.rays(index)).rgb
    return -10 * math.log10(((rgb - dataset.target(index)) ** 2).mean().item())


def test_sizes_follow_the_images_unless_given() -> None:
    config = dataclasses.replace(FastConfig(), levels=5)
    small, large = config.for_images(100), config.for_images(800)
    assert small.levels == large.levels == 5
    assert small.finest_resolution < large.finest_resolution
    assert small.log2_table_size < large.log2_table_size
    assert small.for_images(800) == small
    with pytest.raises(InputError, match="finest_resolution: is 0"):
        FastModel(config)


def test_configuration_survives_json() -> None:
    config = dataclasses.replace(preset("fast"), model=FastConfig().for_images(200))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("features", 3),
        ("attenuation", "sinc"),
        ("mlp_dtype", "bf16"),
        ("net_width", 60),
        ("levels", 17),
        ("min_step", 1.0),
    ],
)
def test_bad_configurations_are_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"FastConfig.{'max_step' if field == 'min_step' else field}"):
        dataclasses.replace(FastConfig(), **{field: value})  # type: ignore[arg-type]


def test_it_learns_a_scene(demo: Dataset) -> None:
    trainer = FastTrainer(_config(250), demo)
    before = _psnr(trainer.model, demo, 0)
    while not trainer.is_done:
        trainer.train_step()
    # A constant picture of the best colour has less than this.
    target = demo.target(0)
    constant = -10 * math.log10(((target - target.mean((0, 1))) ** 2).mean().item())
    after = _psnr(trainer.model, demo, 0)
    assert after > max(before, constant) + 4
    assert trainer.model.skipped_steps == 0


def test_tf32_needs_tensor_cores(demo: Dataset) -> None:
    for dtype in ("auto", "fp32"):
        model = FastModel(dataclasses.replace(TINY, mlp_dtype=dtype))  # type: ignore[arg-type]
        assert not model.fields().tf32
    config = _config(10, dataclasses.replace(TINY, mlp_dtype="tf32"))
    with pytest.raises(InputError, match=r"FastConfig.mlp_dtype: is tf32, but .* not of cpu"):
        FastTrainer(config, demo)
    with pytest.raises(InputError, match=r"FastConfig.mlp_dtype: is tf32"):
        FastModel(dataclasses.replace(TINY, mlp_dtype="tf32")).render_rays(demo.rays(0))


@pytest.mark.parametrize(("capability", "has_them"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_the_gpu_decides_what_auto_is(
    capability: tuple[int, int], has_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert (ops.why_no_tf32(torch.device("cuda")) == "") == has_them
    module = importlib.import_module("mipnerf_fast.ops.implementations")
    monkeypatch.setattr(module, "_WHY_NO_LIBRARY", "")
    monkeypatch.setattr(module, "_WHY_NO_CUDA", "")
    entry = module._implementation("fast_step", torch.device("cuda"), torch.float32)
    assert ("products in TF32 unless" in entry.why) == has_them and ("need compute" in entry.why) != has_them
    # The model asks the same about the device of its parameters.
    cuda = torch.device("cuda")
    monkeypatch.setattr(ops, "why_no_tf32", lambda _, ask=ops.why_no_tf32: ask(cuda))
    assert FastModel(TINY).uses_tf32() == has_them
    assert not FastModel(dataclasses.replace(TINY, mlp_dtype="fp32")).uses_tf32()
    with use_backend("reference"):
        assert not FastModel(TINY).uses_tf32()


def test_resuming_goes_on_bit_by_bit(demo: Dataset, tmp_path: Path) -> None:
    config = _config(40)
    whole = FastTrainer(config, demo)
    first = FastTrainer(config, demo)
    for _ in range(23):
        first.train_step()
    path = tmp_path / "checkpoint.safetensors"
    first.save(path, None)
    second = FastTrainer(config, demo, checkpoint=load_checkpoint(path))
    while not whole.is_done:
        whole.train_step()
    while not second.is_done:
        second.train_step()
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    for moment, tensors in whole.moments().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.moments()[moment][name])


def test_a_checkpoint_builds_the_same_model(demo: Dataset, tmp_path: Path) -> None:
    trainer = FastTrainer(_config(20), demo)
    for _ in range(20):
        trainer.train_step()
    path = tmp_path / "checkpoint.safetensors"
    trainer.save(path, None)
    model = load_checkpoint(path).build_model()
    assert isinstance(model, FastModel)
    rays = demo.rays(1)
    assert torch.equal(render_image(model, rays).rgb, trainer.model.render_rays(rays).rgb)


def test_rendering_by_the_reference_is_the_same(demo: Dataset) -> None:
    trainer = FastTrainer(_config(30), demo)
    for _ in range(30):
        trainer.train_step()
    rays = demo.rays(0).map(lambda field: field[10:14])
    native = trainer.model.render_rays(rays)
    with use_backend("reference"):
        plain = trainer.model.render_rays(rays)
    # Samples are found alike but for rounding at the faces of cells; those change a colour by little.
    assert ((native.rgb - plain.rgb).abs() < 1e-4).float().mean() > 0.99
    assert (native.acc - plain.acc).abs().mean() < 1e-3


def test_query_is_empty_outside_the_box_and_positive_inside() -> None:
    model = FastModel(TINY)
    points = torch.tensor([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    rgb, density = model.query(points, torch.tensor([[0.0, 0.0, -1.0]] * 2), 0.01)
    assert density[0] > 0 and density[1] == 0
    assert ((rgb > -0.01) & (rgb < 1.01)).all()


def test_query_by_the_kernels_is_that_of_the_reference() -> None:
    """What `export` samples its grid with; the bound is 32 roundings of the largest density and of a colour of 1."""
    model = FastModel(dataclasses.replace(TINY, colour_layers=2))
    with torch.no_grad():
        model.tables.uniform_(-1, 1)
    points, away = torch.rand(500, 3) * 4 - 2, torch.tensor([[0.0, 0.6, 0.8]]).expand(500, 3)
    with use_backend("native"):
        rgb, density = model.query(points, away, 0.02)
    with use_backend("reference"):
        wanted_rgb, wanted = model.query(points, away, 0.02)
    assert torch.equal(density == 0, wanted == 0) and 0.2 < (wanted > 0).float().mean() < 0.6
    torch.testing.assert_close(rgb, wanted_rgb, rtol=0, atol=32 * 2.0**-23)
    torch.testing.assert_close(density, wanted, rtol=0, atol=32 * 2.0**-23 * float(wanted.max()))


def test_a_run_folder_is_that_of_any_model(tmp_path: Path) -> None:
    config = _config(30, print_every=10, save_every=20, test_every=20)
    scene = str(write_scene(tmp_path / "scene"))
    result = run_training(scene, config, "fast", tmp_path / "run")
    assert result.step == 30 and result.test_psnr is not None
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") >= 4
    longer = dataclasses.replace(config, max_steps=35)
    again = run_training(scene, longer, "fast", tmp_path / "run", resume=True)
    assert again.step == 35


def test_a_run_with_options_that_decided_nothing_goes_on_without_them(tmp_path: Path) -> None:
    """As they were saved before they were refused; given again they are."""
    config = _config(4, batch_size=512, print_every=2, save_every=2, test_every=0)
    scene, folder = str(write_scene(tmp_path / "scene")), tmp_path / "run"
    run_training(scene, config, "fast", folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["train"] |= {"grad_max_norm": 0.5, "loss": "mse"}
    path.write_text(json.dumps(values))
    longer = dataclasses.replace(config, max_steps=6)
    clipped = dataclasses.replace(longer, grad_max_norm=0.5)
    with pytest.raises(
        InputError, match=r"TrainConfig.grad_max_norm: is 0.5, but the fast model has no such"
    ):
        run_training(scene, clipped, "fast", folder, resume=True)
    result = run_training(scene, longer, "fast", folder, resume=True)
    assert result.step == 6
    assert json.loads(path.read_text())["train"]["grad_max_norm"] == 0


def test_what_it_cannot_train_on_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--device"):
        run_training("demo", _config(5), "fast", tmp_path / "run", downscale=8, device="cuda")
    monkeypatch.setattr(_native, "available", lambda: False)
    with pytest.raises(InputError, match="--preset: the fast model needs the native library"):
        run_training("demo", _config(5), "fast", tmp_path / "run", downscale=8)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------- training on the reference backend


def _loss_curve(backend: str, dataset: Dataset, steps: int, moved: bool = False) -> list[float]:
    """Losses of the first steps; moved: from parameters and cameras that were moved by one float32 ulp."""
    if moved:
        sign = 2 * torch.randint(0, 2, dataset.c2w.shape, generator=torch.Generator().manual_seed(5)) - 1
        dataset = dataclasses.replace(dataset, c2w=dataset.c2w * (1 + 2.0**-23 * sign))
    with use_backend(backend):
        trainer = FastTrainer(_config(200, batch_size=1024), dataset)
        if moved:
            generator = torch.Generator().manual_seed(6)
            for parameter in trainer.model.parameters():
                sign = 2 * torch.randint(0, 2, parameter.shape, generator=generator) - 1
                parameter.data *= 1 + 2.0**-23 * sign
        return [trainer.train_step().loss for _ in range(steps)]


@pytest.mark.usefixtures("one_thread")
def test_both_backends_give_the_same_loss_curve() -> None:
    """As far apart as rounding drives two runs of the reference: 8 times what an ulp of every input does to its curve,
    plus roundings of the loss: one for each step so far, and four for the colours that are averaged."""
    dataset, steps = _spheres(24, 8), 16
    plain = torch.tensor(_loss_curve("reference", dataset, steps), dtype=torch.float64)
    moved = torch.tensor(_loss_curve("reference", dataset, steps, moved=True), dtype=torch.float64)
    native = torch.tensor(_loss_curve("native", dataset, steps), dtype=torch.float64)
    assert plain[-4:].mean() < 0.8 * plain[:4].mean()
    # Rounding grows from step to step: it is held against the most seen up to there.
    spread = (moved - plain).abs().cummax(0).values
    assert spread[-1] < 0.05 * plain[-1]
    allowed = 8 * spread + (4 + torch.arange(steps)) * 2.0**-23 * plain
    assert ((native - plain).abs() <= allowed).all()


@pytest.mark.usefixtures("one_thread")
def test_a_run_on_the_reference_backend_is_whole(tmp_path: Path) -> None:
    scene = str(write_scene(tmp_path / "scene"))
    config = _config(6, batch_size=512, print_every=2, save_every=6, test_every=0)
    result = run_training(scene, config, "fast", tmp_path / "run", backend="reference")
    assert result.step == 6 and math.isfinite(result.test_psnr or math.nan)
