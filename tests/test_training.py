"""Training: the step against its formulas, the presets, the reports of a run, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, tiny, tiny_dataset, write_scene

from mipnerf_fast import (
    InputError,
    MipNerfConfig,
    NerfConfig,
    TrainConfig,
    metrics,
    schedules,
    training_reports,
)
from mipnerf_fast import memory as memory_module
from mipnerf_fast import trainer as trainer_module
from mipnerf_fast.cameras import Rays
from mipnerf_fast.config import PRESETS
from mipnerf_fast.counter_rng import CounterRandom
from mipnerf_fast.data import Dataset, load_dataset
from mipnerf_fast.data.procedural import demo_scene
from mipnerf_fast.memory import bytes_per_ray, choose_chunk, measured_bytes_per_ray
from mipnerf_fast.rendering import render_image
from mipnerf_fast.trainer import Trainer
from mipnerf_fast.training import run_training
from mipnerf_fast.training_reports import ProgressLine
from mipnerf_fast.training_step import clip_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scene"))


def gradients(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])


def accumulate(
    trainer: Trainer, step: int, rays: Rays, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a batch in the parameters' .grad; its loss and mean squared error."""
    work, count = trainer.work, target.shape[0]
    work.flat.sums.zero_()
    rows = torch.arange(count, device=target.device)
    work.accumulate_gradients(step, rays, target, work.total_lossmult(rays), rows)
    return work.loss.clone(), work.squares / (3 * count)


def batch_gradient(
    config: TrainConfig, dataset: Dataset, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, float]:
    trainer = Trainer(config, dataset, device)
    rays, target = trainer.batches.draw(config.seed, 1, config.batch_size)
    # Areas that differ, so that a chunk normalised by its own sum would show.
    areas = torch.where(torch.arange(config.batch_size, device=device)[:, None] % 3 == 0, 16.0, 1.0)
    loss, _ = accumulate(trainer, 1, rays._replace(lossmult=areas), target)
    return gradients(trainer), float(loss)


@pytest.mark.parametrize("chunk", [5, 63])
def test_chunks_change_rounding_only(dataset: Dataset, chunk: int, device: torch.device) -> None:
    whole, loss = batch_gradient(tiny(chunk_rays=64), dataset, device)
    parts, loss_of_parts = batch_gradient(tiny(chunk_rays=chunk), dataset, device)
    # Every gradient element sums terms over 64 rays x 16 samples in float32: reordering a sum of n terms moves it
    # by at most n ulp of the sum of their sizes; that sum is at most sqrt(n) norms for terms of similar size.
    n = 64 * 16
    bound = n * 2.0**-23
    assert (whole - parts).norm() <= bound * whole.norm()
    assert abs(loss - loss_of_parts) <= 64 * 2.0**-23 * loss
    assert whole.norm() > 0


def test_the_loss_is_the_formula(dataset: Dataset, device: torch.device) -> None:
    config = tiny(coarse_loss_mult=0.3, weight_decay_mult=0.5)
    trainer = Trainer(config, dataset, device)
    rays, target = trainer.batches.draw(config.seed, 1, config.batch_size)
    rays = rays._replace(lossmult=torch.linspace(1, 16, 64, device=device)[:, None])
    loss, mse = accumulate(trainer, 1, rays, target)
    random = CounterRandom(config.seed, 1, torch.arange(64, device=device))
    coarse, fine = trainer.model(rays, True, True, random)
    area = rays.lossmult

    def level(rgb: torch.Tensor) -> torch.Tensor:
        return (area * (rgb - target) ** 2).sum() / area.sum()

    weights = torch.cat([p.flatten() for p in trainer.parameters])
    expected = 0.3 * level(coarse.rgb) + level(fine.rgb) + 0.5 * (weights**2).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=64 * 2**-23, atol=0)
    torch.testing.assert_close(mse, ((fine.rgb - target) ** 2).mean().detach(), rtol=192 * 2**-23, atol=0)
    found = gradients(trainer)
    trainer.work.flat.sums.zero_()
    expected.backward()
    assert (gradients(trainer) - found).norm() <= 1024 * 2**-23 * found.norm()


def test_equal_areas_where_the_area_loss_is_disabled(dataset: Dataset) -> None:
    plain, _ = batch_gradient(tiny(disable_multiscale_loss=True), dataset)
    trainer = Trainer(tiny(), dataset)
    rays, target = trainer.batches.draw(TINY.seed, 1, 64)
    accumulate(trainer, 1, rays._replace(lossmult=torch.ones(64, 1)), target)
    assert torch.equal(gradients(trainer), plain)
    weighted, _ = batch_gradient(tiny(), dataset)
    assert not torch.equal(weighted, plain)


@pytest.mark.parametrize(
    ("kind", "beta"), [("mse", 1.0), ("smooth_l1", 1.0), ("smooth_l1", 0.05), ("charbonnier", 0.1)]
)
def test_every_loss_trains(dataset: Dataset, kind: str, beta: float) -> None:
    trainer = Trainer(tiny(loss=kind, loss_beta=beta, max_steps=30), dataset)
    losses = [trainer.train_step().loss for _ in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_smooth_l1_at_beta_1_is_half_the_squared_error(dataset: Dataset) -> None:
    squared, loss = batch_gradient(tiny(), dataset)
    smooth, half = batch_gradient(tiny(loss="smooth_l1", loss_beta=1.0), dataset)
    assert half == pytest.approx(loss / 2, rel=64 * 2**-23)
    assert (smooth - squared / 2).norm() <= 1024 * 2**-23 * squared.norm()


def test_gradients_are_clipped_by_value_then_by_norm() -> None:
    def clip(max_value: float, max_norm: float) -> tuple[list[float], float]:
        found = torch.tensor([3.0, -4.0, 12.0])
        norm = clip_gradients(found, max_value, max_norm)
        return found.tolist(), float(norm)

    assert clip(0, 0) == ([3, -4, 12], 13)
    assert clip(3.5, 0) == ([3, -3.5, 3.5], pytest.approx(math.sqrt(9 + 2 * 3.5**2)))
    assert clip(0, 20)[0] == [3, -4, 12]
    scaled, _ = clip(0, 2)
    assert scaled == pytest.approx([g * 2 / (1e-7 + 13) for g in (3, -4, 12)], rel=1e-6)
    # By value first: the norm that the second clipping sees is that of what the first left.
    both, norm = clip(3.5, 2)
    assert both == pytest.approx([g * 2 / (1e-7 + norm) for g in (3, -3.5, 3.5)], rel=1e-6)


def test_a_zero_gradient_survives_clipping() -> None:
    found = torch.zeros(3)
    clip_gradients(found, 1.0, 1.0)
    assert found.tolist() == [0, 0, 0]


def test_adam_takes_the_clipped_gradient(dataset: Dataset) -> None:
    trainer = Trainer(tiny(grad_max_norm=1e-3, lr_delay_steps=0), dataset)
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.train_step()
    norm = float(gradients(trainer).norm())
    assert norm == pytest.approx(1e-3, rel=1e-5)
    # The first step of Adam: -lr g / (|g| + eps), the moments' corrections cancelling.
    lr = schedules.learning_rate(1, TINY.lr_init, TINY.lr_final, TINY.max_steps)
    for old, p in zip(before, trainer.parameters, strict=True):
        assert p.grad is not None
        expected = old - lr * p.grad / (p.grad.abs() + TINY.adam_eps)
        # eps enters Adam beside a bias-corrected root of a float32 square: a few ulp of the step and of the weight.
        torch.testing.assert_close(p.detach(), expected, rtol=2**-21, atol=lr * 2**-18)


def test_the_learning_rate_follows_the_steps(dataset: Dataset, device: torch.device) -> None:
    trainer = Trainer(tiny(), dataset, device)
    for step in range(1, 6):
        result = trainer.train_step()
        expected = schedules.learning_rate(
            step, TINY.lr_init, TINY.lr_final, TINY.max_steps, TINY.lr_delay_steps, TINY.lr_delay_mult
        )
        # In float64 on the device, a few functions apart from the host's; the optimiser takes it as float32.
        assert result.rate == pytest.approx(expected, rel=2.0**-48)
        assert float(trainer.work.optimizer.param_groups[0]["lr"]) == pytest.approx(expected, rel=2.0**-24)


def test_a_time_limit_stretches_the_schedule(dataset: Dataset, device: torch.device) -> None:
    config = tiny(max_steps=1000, lr_delay_steps=10, lr_delay_mult=0.1)
    trainer = Trainer(config, dataset, device, max_seconds=60)

    def rate_of_next(step: int, seconds: float) -> float:
        trainer.step, trainer.seconds = step, seconds
        trainer.work.words[0] = step
        return trainer.train_step().rate

    def expected(progress: float, step: int) -> object:
        decay = schedules.log_lerp(progress, config.lr_init, config.lr_final)
        # The share of the time reaches the device as float32: its rounding, times ln(lr_init / lr_final).
        return pytest.approx(decay * schedules.warm_up(step, 10, 0.1), rel=math.log(10) * 2.0**-24)

    # Half of the time is over: half of the decay, while the warm-up counts steps.
    assert rate_of_next(4, 30.0) == expected(0.5, 5)
    assert rate_of_next(899, 30.0) == expected(0.9, 900)
    assert not trainer.is_done
    assert rate_of_next(899, 60.0) == expected(1.0, 900)
    assert trainer.is_done
    trainer.step, trainer.seconds = 1000, 0.0
    assert trainer.is_done


def test_only_steps_count_as_training_time(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(t) for t in range(100))
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: next(clock))
    trainer = Trainer(tiny(), dataset)
    trainer.train_step()
    for _ in range(10):
        next(clock)  # an evaluation, say
    trainer.train_step()
    # The clock ticks once in each launch and once in each look for results.
    assert trainer.seconds == 4.0


def test_the_batch_is_cut_where_memory_is_short(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(batch_size=1000)
    per_ray = bytes_per_ray(config)

    def chunk(rays_that_fit: float) -> int:
        memory = int(2 * rays_that_fit * per_ray) + 1
        monkeypatch.setattr(memory_module, "free_memory", lambda device: memory)
        return choose_chunk(1000, per_ray, torch.device("cpu"))

    assert chunk(1e6) == 1000
    assert chunk(999) == 500
    assert chunk(300) == 250
    assert chunk(0.1) == 1
    assert Trainer(config, dataset).chunk_rays == 1
    trainer = Trainer(tiny(batch_size=1000, chunk_rays=400), dataset)
    assert trainer.chunk_rays == 400
    assert "1,000 rays a step in 3 passes of 400" in trainer.describe_batch()
    assert trainer.describe_passes() == "3 passes of 400"
    trainer = Trainer(tiny(batch_size=1000, chunk_rays=4000), dataset)
    assert trainer.chunk_rays == 1000
    assert trainer.describe_passes() == "one pass"


class Allocator:
    """What torch says of a GPU's memory, of a pass that takes `ray` bytes for every ray and some others besides."""

    def __init__(self, ray: int, free: int) -> None:
        self.ray, self.free = ray, free
        # Of the model; a pass leaves a workspace behind when it is the first, and gradients.
        self.held, self.peak = 10_000_000, 0
        self.is_fresh, self.passes = True, []

    def do_pass(self, rays: int) -> None:
        self.passes.append(rays)
        if self.is_fresh:
            self.is_fresh, self.held = False, self.held + 33_554_432
        self.peak = max(self.peak, self.held + 1_000_000 + self.ray * rays)

    def reset(self, device: torch.device) -> None:
        self.peak = self.held

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = memory_module.torch.cuda
        monkeypatch.setattr(cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(cuda, "memory_allocated", lambda device: self.held)
        monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(memory_module, "free_memory", lambda device: self.free)


@pytest.mark.parametrize("ray", [1, 1001, 6_515_712])
def test_the_probe_finds_what_a_ray_takes(monkeypatch: pytest.MonkeyPatch, ray: int) -> None:
    """Whatever a pass takes besides, and whatever the first one keeps."""
    allocator = Allocator(ray, free=2**33)
    allocator.install(monkeypatch)
    assert measured_bytes_per_ray(allocator.do_pass, torch.device("cuda")) == ray


# A card of 8 GB whose driver keeps half a gigabyte. The passes of the plain graph take more than the fused kernels'.
EIGHT_GB = 8 * 10**9 - 2**29


@pytest.mark.parametrize(("ray", "passes"), [(500_000, "one pass"), (2_000_000, "3 passes of 1,366")])
def test_a_gpu_cuts_the_batch_by_what_it_has_measured(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, ray: int, passes: str
) -> None:
    trainer = Trainer(tiny(batch_size=4096, chunk_rays=16), dataset)
    allocator = Allocator(ray, EIGHT_GB)
    allocator.install(monkeypatch)
    monkeypatch.setattr(trainer, "_probe", allocator.do_pass)
    trainer.config, trainer.device = tiny(batch_size=4096), torch.device("cuda")
    trainer.chunk_rays = trainer._choose_chunk(None, 4096)
    assert set(allocator.passes) == {64, 192}
    assert trainer.describe_passes() == passes
    # No pass takes more than half of the memory.
    assert trainer.chunk_rays * ray <= EIGHT_GB / 2


def test_the_probe_is_a_pass_that_leaves_the_run_as_it_was(dataset: Dataset) -> None:
    plain, probed = Trainer(tiny(), dataset), Trainer(tiny(), dataset)
    before = [p.detach().clone() for p in probed.parameters]
    probed._probe(40)
    assert float(probed.work.squares) > 0
    assert float(gradients(probed).norm()) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, probed.parameters, strict=True))
    assert [plain.train_step().loss for _ in range(2)] == [probed.train_step().loss for _ in range(2)]


def test_the_paper_step_fits_a_card_of_8_gb(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """On a GPU by what the step takes, the recording included; on a CPU, where it takes minutes, by the estimate."""
    on_cuda, config = device.type == "cuda", PRESETS["paper"]
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        others = torch.cuda.memory_reserved(device)
    monkeypatch.setattr(memory_module, "free_memory", lambda device: EIGHT_GB)
    trainer = Trainer(config, dataset, device)
    passes = math.ceil(4096 / trainer.chunk_rays)
    assert trainer.chunk_rays == math.ceil(4096 / passes)
    if on_cuda:
        for _ in range(6):
            assert not trainer.train_step().is_skipped
        assert torch.cuda.max_memory_reserved(device) - others <= EIGHT_GB
        return
    assert passes > 1
    # In equal parts, each within half of the memory; one part fewer would not be.
    assert trainer.chunk_rays * bytes_per_ray(config) <= EIGHT_GB / 2
    assert math.ceil(4096 / (passes - 1)) * bytes_per_ray(config) > EIGHT_GB / 2


def graph_bytes(config: TrainConfig, dataset: Dataset) -> int:
    """What autograd really saves for one batch, each storage once."""
    trainer = Trainer(config, dataset)
    rays, target = trainer.batches.draw(0, 1, config.batch_size)
    saved = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        accumulate(trainer, 1, rays, target)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize(
    "model",
    [
        MipNerfConfig(num_samples=16, net_width=64, net_width_condition=32),
        NerfConfig(num_coarse=8, num_fine=16, net_width=64, net_width_condition=32),
    ],
)
def test_the_memory_estimate_is_above_what_is_saved(
    dataset: Dataset, model: MipNerfConfig | NerfConfig
) -> None:
    config = tiny(model=model, chunk_rays=64)
    saved = graph_bytes(config, dataset) / 64
    # Above what the graph holds (there are temporaries besides), but not so far that it would waste a machine.
    assert saved < bytes_per_ray(config) < 4 * saved


def small_network(config: TrainConfig) -> TrainConfig:
    """A preset with everything that makes it what it is, but a narrow network and few samples and rays."""
    model = config.model
    if isinstance(model, NerfConfig):
        model = dataclasses.replace(model, num_coarse=8, num_fine=8, net_width=16, net_width_condition=8)
    else:
        model = dataclasses.replace(model, num_samples=8, net_width=16, net_width_condition=8)
    return dataclasses.replace(config, model=model, batch_size=32)


# The fast model has a trainer of its own: test_fast_training.py.
@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("fast")])
def test_every_preset_trains(dataset: Dataset, name: str, device: torch.device) -> None:
    trainer = Trainer(small_network(PRESETS[name]), dataset, device)
    before = [p.detach().clone() for p in trainer.parameters]
    results = [trainer.train_step() for _ in range(2)]
    assert all(math.isfinite(result.loss) for result in results)
    moved = [not torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True)]
    # no-misc starts with a ReLU on the density that may be dead on so few rays.
    assert all(moved) or (name in ("no-misc", "nerf") and any(moved))


def test_training_reaches_its_psnr(device: torch.device) -> None:
    train = demo_scene("train", size=16, views=12, supersample=2)
    test = demo_scene("test", size=16, views=4, supersample=2)
    config = TrainConfig(
        model=MipNerfConfig(
            num_samples=16, max_deg_point=5, deg_view=1, net_depth=2, net_width=32, net_width_condition=32
        ),
        batch_size=256,
        max_steps=120,
        lr_init=1e-2,
        lr_final=1e-3,
        lr_delay_steps=20,
        lr_delay_mult=0.1,
    )
    trainer = Trainer(config, train, device)
    truth = torch.stack([test.target(i) for i in range(4)])
    while not trainer.is_done:
        trainer.train_step()
    rendered = torch.stack([render_image(trainer.model, test.rays(i)).rgb.cpu() for i in range(4)])
    # The best that one colour for everything can do; a scene that has been learnt is far above it.
    flat = metrics.psnr(truth.mean((0, 1, 2)).expand_as(truth), truth).mean()
    assert flat < 13
    assert metrics.psnr(rendered, truth).mean() > 17


def test_a_run_leaves_its_reports(scene: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    result = run_training(str(scene), TINY, "tiny", run_dir, device="cpu")
    assert (result.step, result.interrupted) == (20, False)
    assert result.checkpoint == run_dir / "checkpoints" / "step_00000020.safetensors"
    assert result.checkpoint.is_file()
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Every 5 steps, and wherever there is a checkpoint (every 4) or a test render (every 10).
    assert [int(row["step"]) for row in rows] == [4, 5, 8, 10, 12, 15, 16, 20]
    assert [row["test_view"] for row in rows] == ["", "", "", "r_0", "", "", "", "r_1"]
    assert [bool(row["test_psnr"]) for row in rows] == [True, False, True, True, True, False, True, True]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    assert float(rows[-1]["test_psnr"]) == result.test_psnr
    assert float(rows[-1]["psnr"]) == result.psnr
    previews = sorted(path.name for path in (run_dir / "previews").iterdir())
    assert previews == ["step_00000010.png", "step_00000020.png"]
    assert (run_dir / "curves.png").stat().st_size > 10_000
    assert list((run_dir / "tensorboard").glob("events*"))
    said = capfd.readouterr().err
    assert "4 training views, 4 test views" in said
    assert "malloc keeps its pages" in said or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION")
    assert str(result.checkpoint) in said


class Terminal(io.StringIO):
    """An output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_shows_what_is_left(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    output = Terminal() if is_terminal else io.StringIO()
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr(sys, "stderr", output)
    monkeypatch.setattr(training_reports.time, "monotonic", lambda: next(clock))
    # Resumed at step 100: what is left follows from the steps done here, 10 in 20 s, or from the time limit.
    progress = ProgressLine(100, 1000, 400.0, 600.0, passes="7 passes of 586")
    progress.update(110, 420.0, 12345.6, 21.5)
    progress.update(120, 550.0, 12345.6, 22.5)
    progress.close()
    text = output.getvalue()
    assert "step 110 of 1,000, 12,346 rays/s in 7 passes of 586, PSNR 21.50 dB, 3:00 left" in text
    assert "step 120 of 1,000, 12,346 rays/s in 7 passes of 586, PSNR 22.50 dB, 0:50 left" in text
    # The bar shows whichever limit is nearer: 550 of 600 s.
    assert ("92%|" in text) == is_terminal
    assert ("train: step" in text) != is_terminal


def test_the_progress_line_says_how_a_step_is_cut(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_reports, "_SECONDS_BETWEEN_LINES", 0.0)
    config = tiny(max_steps=2, test_every=0, chunk_rays=32)
    run_training(str(scene), config, "tiny", tmp_path / "run", device="cpu")
    assert "rays/s in 2 passes of 32, PSNR" in capfd.readouterr().err


def test_the_training_psnr_is_of_the_mean_squared_error(scene: Path, tmp_path: Path) -> None:
    config = tiny(max_steps=3, print_every=3, save_every=100, test_every=0)
    run_training(str(scene), config, "tiny", tmp_path / "run", device="cpu")
    with open(tmp_path / "run" / "metrics.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    trainer = Trainer(config, load_dataset(str(scene)))
    results = [trainer.train_step() for _ in range(3)]
    assert float(row["psnr"]) == pytest.approx(-10 * math.log10(sum(r.mse for r in results) / 3), abs=1e-3)
    assert float(row["loss"]) == pytest.approx(sum(r.loss for r in results) / 3, rel=1e-4)


def test_without_tensorboard_it_is_skipped_and_said(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    run_training(str(scene), tiny(max_steps=2, test_every=0), "tiny", tmp_path / "run", device="cpu")
    assert "TensorBoard events skipped" in capfd.readouterr().err
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert (tmp_path / "run" / "metrics.csv").is_file()


def test_a_scene_without_test_views_trains(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene", splits=("train",))
    result = run_training(str(scene), tiny(max_steps=10), "tiny", tmp_path / "run", device="cpu")
    assert (result.step, result.test_psnr) == (10, None)


def test_a_time_limit_ends_the_run(scene: Path, tmp_path: Path) -> None:
    config = tiny(max_steps=10**6, save_every=10**6, test_every=0, print_every=1000)
    result = run_training(str(scene), config, "tiny", tmp_path / "run", device="cpu", max_minutes=0.3 / 60)
    assert 0.3 <= result.seconds < 20
    assert 0 < result.step < 10**6
    assert not result.interrupted


def test_the_seed_decides_and_the_global_state_does_not(dataset: Dataset) -> None:
    def losses(seed: int, global_seed: int) -> list[float]:
        torch.manual_seed(global_seed)
        trainer = Trainer(tiny(seed=seed), dataset)
        return [trainer.train_step().loss for _ in range(3)]

    assert losses(1, 1) == losses(1, 2)
    assert losses(1, 1) != losses(2, 1)


REFUSED = {
    "--max-minutes: must be positive, got 0": {"max_minutes": 0},
    "--max-minutes: must be positive, got nan": {"max_minutes": math.nan},
    "--device: expected one of auto, cpu, cuda": {"device": "tpu"},
    "--backend: expected one of auto, native, reference": {"backend": "fast"},
    "missing.*does not exist": {"data": "missing"},
    "downscale": {"downscale": 3},
    "background": {"background": "green"},
    "--resume: .*there is no run to resume": {"resume": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(scene: Path, tmp_path: Path, message: str) -> None:
    arguments: dict[str, object] = {"data": str(scene), "device": "cpu"} | REFUSED[message]
    with pytest.raises(InputError, match=message):
        run_training(config=TINY, preset="tiny", run_dir=tmp_path / "run", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_an_unusable_run_folder_is_refused(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("here first")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"--run-dir: .*file is a file, expected a folder"):
            run_training(str(scene), TINY, "tiny", run_dir, device="cpu")
    # Permissions do not stop root, who runs tests in containers: ask the check instead.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=r"--run-dir: .*run cannot be made: .* is not writable"):
        run_training(str(scene), TINY, "tiny", tmp_path / "run", device="cpu")
    assert (tmp_path / "file").read_text() == "here first"
    assert not (tmp_path / "run").exists()


def test_steps_of_zero_are_refused() -> None:
    with pytest.raises(InputError, match=r"TrainConfig.max_steps: must be at least 1, got 0"):
        tiny(max_steps=0)
