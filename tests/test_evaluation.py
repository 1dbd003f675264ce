"""Evaluation: the numbers, and the reports that carry them."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import pytest
import torch
from analytic_models import Ball
from tiny_scenes import dataset

from mipnerf_fast import Composite, FastConfig, FastModel, metrics
from mipnerf_fast.data import Dataset
from mipnerf_fast.evaluation import evaluate, markdown_table, score, terminal_table, write_reports

RUN_KEYS = {"device", "torch", "revision", "backend", "precision", "mode", "steps", "seconds"}


class Constant(Ball):
    """One colour everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(
        self, rays: object, randomized: bool = False, white_background: bool = True
    ) -> list[Composite]:
        assert not randomized
        rgb = torch.full_like(rays.origins, self.value)
        return [Composite(rgb, rgb[..., 0], rgb[..., 0], rgb[..., :1])]


@pytest.fixture
def white() -> Dataset:
    """Three images of scale 2 and one of scale 4, all white."""
    return dataset([24, 12, 24, 24], [2, 4, 2, 2], Constant(1.0))


def test_scores_of_a_constant_error(white: Dataset) -> None:
    # float32 of 0.9 - 1 is off by at most 2^-25 of 1, so the squared error 0.01 by a factor 1 +- 6e-7.
    below = evaluate(Constant(0.9), white).mean()
    assert below.psnr == pytest.approx(20.0, abs=1e-5)
    # Not clipped to the white of the truth: the error above counts as much.
    assert evaluate(Constant(1.1), white).mean().psnr == pytest.approx(20.0, abs=1e-5)


def test_a_perfect_ball_has_only_the_error_of_eight_bits() -> None:
    data = dataset([32, 32], [1, 1], Ball())
    mean = evaluate(Ball(), data).mean()
    # Rounding to 8 bits is off by at most half a level.
    assert mean.psnr > 20 * math.log10(2 * 255)
    assert mean.ssim > 0.999


def test_scales_weigh_the_same_in_the_mean() -> None:
    data = dataset([24, 12, 24, 24], [2, 4, 2, 2], Ball())
    evaluation = evaluate(Ball(radius=0.9), data)
    by_scale = evaluation.scales()
    assert {scale: count for scale, (_, count) in by_scale.items()} == {2: 3, 4: 1}
    for scale, (scores, _) in by_scale.items():
        views = [view.scores.psnr for view in evaluation.views if view.scale == scale]
        assert scores.psnr == pytest.approx(sum(views) / len(views))
    assert by_scale[2][0].psnr != pytest.approx(by_scale[4][0].psnr, abs=1e-3)
    assert evaluation.mean().psnr == pytest.approx((by_scale[2][0].psnr + by_scale[4][0].psnr) / 2)


def test_scores_agree_with_the_metrics() -> None:
    a, b = torch.rand(2, 16, 18, 3)
    got = score(a, b)
    assert got.psnr == float(metrics.psnr(a, b))
    assert got.ssim == float(metrics.ssim(a, b))
    assert got.lpips is None


def test_what_cannot_be_measured_is_none() -> None:
    small = torch.rand(10, 16, 3)
    assert score(small, small + 0.1).ssim is None
    assert score(small, small).psnr is None  # infinite
    assert score(small * math.nan, small).psnr is None


def test_metrics_json(white: Dataset, tmp_path: Path) -> None:
    write_reports(evaluate(Constant(0.9), white, steps=12, seconds=3.5), tmp_path / "run" / "eval")
    path = tmp_path / "run" / "eval" / "metrics.json"
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(found) == ["split", "background", "scales", "mean", "run"]
    assert (found["split"], found["background"]) == ("test", "white")
    assert list(found["scales"]) == ["2", "4"]
    for entry in found["scales"].values():
        assert set(entry) == {"psnr", "ssim", "lpips", "images"}
        assert entry["psnr"] == pytest.approx(20.0, abs=1e-5)
        assert entry["lpips"] is None
    assert [entry["images"] for entry in found["scales"].values()] == [3, 1]
    assert set(found["mean"]) == {"psnr", "ssim", "lpips", "average_error"}
    assert found["mean"]["lpips"] is found["mean"]["average_error"] is None
    assert set(found["run"]) == RUN_KEYS
    assert (found["run"]["steps"], found["run"]["seconds"]) == (12, 3.5)
    assert found["run"]["precision"] == "float32"
    assert found["run"]["torch"] == torch.__version__


def test_precision_is_what_the_fast_model_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FastModel(FastConfig(levels=2, finest_resolution=32, log2_table_size=9, occupancy_resolution=32))
    data = dataset([12], [1], Ball())
    assert evaluate(model, data).run["precision"] == "float32"
    monkeypatch.setattr(FastModel, "precision", "float32; tables float16, products tf32")
    evaluation = evaluate(model, data)
    assert evaluation.run["precision"] == "float32; tables float16, products tf32"
    assert "float32; tables float16, products tf32, backend" in markdown_table(evaluation)


def test_tables_say_what_was_measured(white: Dataset, tmp_path: Path) -> None:
    evaluation = evaluate(Constant(0.9), white, steps=12, seconds=3.5)
    write_reports(evaluation, tmp_path)
    for text in (
        terminal_table(evaluation),
        markdown_table(evaluation),
        (tmp_path / "metrics.md").read_text(),
    ):
        for fact in (
            "test split",
            "white background",
            "1/2 (24 x 24)",
            "1/4 (12 x 12)",
            "float32",
            "backend",
        ):
            assert fact in text
        for fact in (torch.__version__, "12 steps", "3.5 s", "20.00", "n/a", evaluation.run["revision"]):
            assert fact in text
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["scale"] for row in rows] == ["2", "4", "mean"]
    assert all(row["lpips"] == "" and row["split"] == "test" and row["torch"] for row in rows)
    assert [float(row["psnr"]) for row in rows] == pytest.approx([20.0] * 3, abs=1e-5)
    views = list(csv.DictReader((tmp_path / "views.csv").open()))
    assert [view["name"] for view in views] == white.names


def test_black_background_is_evaluated_on_black() -> None:
    data = dataset([24], [1], Ball(), background="black")
    evaluation = evaluate(Ball(), data)
    assert evaluation.background == "black"
    assert evaluation.mean().psnr > 20 * math.log10(2 * 255)


def test_pictures_of_the_views(white: Dataset, tmp_path: Path) -> None:
    evaluate(Constant(0.2), white, pictures=tmp_path / "images")
    paths = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert imageio.imread(paths[1]).shape == (12, 12, 3)
    assert set(imageio.imread(paths[0]).ravel()) == {51}


class FakeLpips(torch.nn.Module):
    """Stands in for the optional package: the mean absolute difference of what it is given."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape == b.shape == (1, 3, *a.shape[2:])
        assert float(a.min()) >= -1
        assert float(a.max()) <= 1
        return (a - b).abs().mean().reshape(1, 1, 1, 1)


def test_lpips_where_it_is_at_hand(white: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=FakeLpips))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    absent = evaluate(Constant(0.9), white)
    assert absent.mean().lpips is None
    assert "weights" in absent.lpips_note
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").touch()
    there = evaluate(Constant(0.9), white, steps=1, seconds=1.0)
    mean = there.mean()
    assert mean.lpips == pytest.approx(0.2, abs=1e-6)  # in [-1, 1] a difference of 0.1 is one of 0.2
    assert there.average_error() == metrics.average_error(mean.psnr, mean.ssim, mean.lpips)
    assert "vgg" in markdown_table(there)
    assert "n/a" not in markdown_table(there)


def test_no_lpips_package_is_said(white: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "LPIPS n/a: the package lpips is not installed" in markdown_table(evaluate(Constant(0.9), white))
