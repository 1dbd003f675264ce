"""The whole job through the command line: train, evaluate, render, export, on a tiny scene."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import trimesh
from analytic_models import Ball
from tiny_scenes import write_blender

from mipnerf_fast import cli
from mipnerf_fast.plots import strip, view_strip

SIZE = 24
NETWORK = "--num-samples 16 --net-depth 2 --net-width 32 --net-width-condition 16 --max-deg-point 6 --batch-size 256"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Batches this small gain nothing from a second thread and wait for it where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blender(tmp_path_factory.mktemp("pipeline") / "scene", Ball(), size=SIZE, views=6)


@pytest.fixture(scope="module")
def run(scene: Path) -> Path:
    """A run of some seconds."""
    folder = scene.parent / "run"
    line = f"train --data {scene} --preset small --run-dir {folder} --max-steps 300 --save-every 150 --test-every 150"
    assert cli.main([*line.split(), *NETWORK.split(), "--lr-init", "1e-2"]) == 0
    return folder


def test_training_reaches_its_psnr(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A constant picture of the best colour scores below 12 dB here; 20 dB needs the ball's shape and colours."""
    assert cli.main(["eval", "--run-dir", str(run), "--images"]) == 0
    found = json.loads((run / "eval" / "metrics.json").read_text())
    assert list(found["scales"]) == ["1"]
    assert found["scales"]["1"]["images"] == 6
    assert found["mean"]["psnr"] > 20
    assert found["mean"]["psnr"] == found["scales"]["1"]["psnr"]
    assert found["mean"]["ssim"] > 0.5
    assert found["run"]["steps"] == 300
    assert found["run"]["seconds"] > 0
    output = capsys.readouterr().out
    for words in (
        "test split",
        "white background",
        "1/1 (24 x 24)",
        f"{found['mean']['psnr']:.2f}",
        "metrics.json",
    ):
        assert words in output
    assert len(list((run / "eval" / "images").iterdir())) == 6


def test_a_constant_picture_scores_less(scene: Path) -> None:
    """What the bound above is measured against."""
    images = np.stack([imageio.imread(path) for path in sorted((scene / "test").iterdir())]) / 255
    rgb = images[..., :3] * images[..., 3:] + 1 - images[..., 3:]
    assert -10 * np.log10(((rgb - rgb.mean((0, 1, 2))) ** 2).mean()) < 12


def test_eval_at_another_scale_and_split(run: Path) -> None:
    assert cli.main(["eval", "--run-dir", str(run), "--split", "train", "--downscale", "2"]) == 0
    found = json.loads((run / "eval" / "metrics.json").read_text())
    assert found["split"] == "train"
    assert list(found["scales"]) == ["2"]
    # Twelve pixels still hold SSIM's window of eleven.
    assert found["mean"]["ssim"] is not None


@pytest.mark.parametrize("path", ["test", "turntable", "spiral", "zoom"])
def test_render(run: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["render", "--run-dir", str(run), "--path", path, "--frames", "2"]) == 0
    assert "video" in capsys.readouterr().out
    folder = run / "render" / path
    for kind in ("rgb", "depth", "opacity", "normals"):
        images = [imageio.imread(folder / kind / f"{k:04d}.png") for k in range(2)]
        assert all(image.shape == (SIZE, SIZE, 3) for image in images)
        assert np.std(images) > 3
        assert imageio.imread(folder / f"{kind}.mp4").shape == (2, SIZE, SIZE, 3)


def test_render_takes_fewer_kinds(run: Path) -> None:
    line = ["render", "--run-dir", str(run), "--path", "turntable", "--frames", "1", "--kinds", "rgb"]
    assert cli.main(line) == 0
    assert sorted(path.name for path in (run / "render" / "turntable").iterdir()) == ["rgb", "rgb.mp4"]


def test_results_that_cannot_be_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, line in (("eval", []), ("render", ["--path", "zoom"]), ("export", [])):
        (run / name).rename(run / "aside") if (run / name).exists() else None
        (run / name).write_text("in the way")
        capsys.readouterr()
        assert cli.main([name, "--run-dir", str(run), *line]) == 2
        assert str(run / name) in capsys.readouterr().err
        (run / name).unlink()
        (run / "aside").rename(run / name) if (run / "aside").exists() else None


def test_export(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--run-dir", str(run), "--resolution", "32"]) == 0
    assert "Otsu" in capsys.readouterr().out
    with np.load(run / "export" / "density.npz") as grid:
        assert grid["density"].shape == (32, 32, 32)
        threshold = float(grid["threshold"])
    mesh = trimesh.load(run / "export" / "mesh.ply", process=False)
    assert trimesh.load(run / "export" / "mesh.glb", force="mesh").volume > 0
    # Most of the surface belongs to the ball of radius 1: to a voxel of 0.1, and as much for what 300 steps leave.
    distance = np.linalg.norm(mesh.vertices, axis=-1)
    assert 0.8 < np.median(distance) < 1.2
    again = ["export", "--run-dir", str(run), "--resolution", "16", "--formats", "npz", "--threshold", "0.7"]
    assert cli.main([*again, "--box", "-1", "-1", "-1", "1", "1", "0"]) == 0
    with np.load(run / "export" / "density.npz") as grid:
        assert grid["density"].shape == (16, 16, 9)  # 7.5 voxels of 2/15, rounded to 8
        assert float(grid["threshold"]) == 0.7 != threshold


def test_export_of_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.rglob("*"))
    capsys.readouterr()
    line = ["export", "--run-dir", str(run), "--resolution", "8", "--threshold", "1e9"]
    assert cli.main(line) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no surface" in error
    assert "range from" in error
    assert sorted(run.rglob("*")) == before


def test_export_without_its_packages(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trimesh", None)
    assert cli.main(["export", "--run-dir", str(run)]) == 2
    assert "mipnerf_fast[export]" in capsys.readouterr().err


def test_resume_goes_on(run: Path, scene: Path) -> None:
    line = f"train --data {scene} --preset small --run-dir {run} --max-steps 310 --save-every 150 --resume"
    assert cli.main([*line.split(), *NETWORK.split(), "--lr-init", "1e-2", "--test-every", "150"]) == 0
    assert cli.main(["eval", "--run-dir", str(run)]) == 0
    assert json.loads((run / "eval" / "metrics.json").read_text())["run"]["steps"] == 310


def test_multiscale_through_convert(scene: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "multi", tmp_path / "run"
    assert cli.main(["convert", "--data", str(scene), "--out", str(out), "--levels", "2"]) == 0
    line = f"train --data {out} --preset paper --run-dir {folder} --max-steps 3"
    assert cli.main([*line.split(), *NETWORK.split()]) == 0
    assert cli.main(["eval", "--run-dir", str(folder)]) == 0
    found = json.loads((folder / "eval" / "metrics.json").read_text())
    assert {scale: entry["images"] for scale, entry in found["scales"].items()} == {"1": 6, "2": 6}
    assert cli.main(["render", "--run-dir", str(folder), "--path", "test", "--kinds", "rgb"]) == 0
    assert len(list((folder / "render" / "test" / "rgb").iterdir())) == 6


def test_nerf_goes_the_same_way(scene: Path, tmp_path: Path) -> None:
    line = f"train --data {scene} --preset nerf --run-dir {tmp_path / 'run'} --max-steps 2 --batch-size 32"
    network = "--num-coarse 8 --num-fine 8 --net-depth 2 --net-width 16 --net-width-condition 8"
    assert cli.main([*line.split(), *network.split()]) == 0
    assert cli.main(["eval", "--run-dir", str(tmp_path / "run")]) == 0
    assert cli.main(["render", "--run-dir", str(tmp_path / "run"), "--path", "zoom", "--frames", "1"]) == 0


def test_strip(run: Path, scene: Path, tmp_path: Path) -> None:
    from mipnerf_fast.checkpoint import load_model
    from mipnerf_fast.data import load_dataset

    model, _, _ = load_model(run)
    view_strip(model, load_dataset(scene, "test"), [0, 3], tmp_path / "strip.png")
    image = imageio.imread(tmp_path / "strip.png")
    # Two rows of five panels of 24 x 10 pixels, with gaps of 8 and labels of 26 above.
    assert image.shape == (26 + 2 * (240 + 8), 8 + 5 * (240 + 8), 3)
    panels = [image[26:266, 8 + 248 * k : 248 + 248 * k].astype(float) for k in range(5)]
    assert all(panel.std() > 3 for panel in panels)
    # The render resembles the truth more than its own negative.
    assert np.abs(panels[0] - panels[1]).mean() < np.abs(panels[0] - (255 - panels[1])).mean()
    assert image[:26].min() < 100  # the labels
    with pytest.raises(ValueError, match="one size"):
        strip([[np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)]], ["a", "b"])


def test_a_tiny_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo script, on the built-in scene made small: everything is there, and a second run replaces it."""
    from benchmarks import demo
    from mipnerf_fast.data import procedural

    monkeypatch.setattr(procedural, "VIEWS", {"train": 2, "val": 1, "test": 1})
    # A cache of its own: the one of the process must keep the real views.
    monkeypatch.setattr(procedural, "_rendered", functools.cache(procedural._rendered.__wrapped__))
    monkeypatch.setattr(demo, "FEWEST_FRAMES", 4)
    monkeypatch.setattr(demo, "MOST_FRAMES", 4)
    out = tmp_path / "outputs" / "demo"
    for _ in range(2):
        assert demo.main(["--out", str(out), "--minutes", "0.02", "--downscale", "8"]) == 0
        assert not (out / "old").exists()
        (out / "old").touch()
    (out / "old").unlink()
    names = {"strip.png", "turntable.mp4", "turntable_depth.mp4", "curves.png", "metrics.md", "metrics.json"}
    assert names < {path.name for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["demo"]
    assert imageio.imread(out / "turntable.mp4").shape == (4, 26, 26, 3)  # 25 x 25, made even
    output = capsys.readouterr().out
    assert all(
        str(out / name) in output for name in ("strip.png", "turntable.mp4", "curves.png", "metrics.md")
    )
    assert demo.main(["--out", str(out), "--minutes", "-1"]) == 2
    assert "--max-minutes" in capsys.readouterr().err
    assert names < {path.name for path in out.iterdir()}
