"""The command line: flags, exit status, and bad input refused in one sentence before anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from analytic_models import Ball
from PIL import Image
from tiny_scenes import write_blender

from mipnerf_fast import cli, ops
from mipnerf_fast.config import PRESETS, MipNerfConfig, NerfConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_blender(tmp_path / "scene", Ball(), size=8, views=2)


def everything_in(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """Run the command, which must fail with one sentence and leave the folder as it was; return the sentence."""
    before = everything_in(folder)
    capsys.readouterr()
    status = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert status == cli.BAD_INPUT
    assert output.out == ""
    lines = output.err.strip().splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("mipnerf-fast: ")
    assert "Traceback" not in output.err
    assert everything_in(folder) == before
    return lines[0]


# usage


def test_train_flags_and_presets(tmp_path: Path) -> None:
    line = (
        "train --data demo --preset small --run-dir runs/a --downscale 4 --max-steps 7 --max-minutes 1.5 "
        "--seed 3 --save-every 9 --device cpu --backend reference --resume"
    )
    verb = cli.parse(line.split())
    assert isinstance(verb, cli.Train)
    assert (verb.data, verb.run_dir, verb.downscale, verb.max_minutes) == ("demo", Path("runs/a"), 4, 1.5)
    assert (verb.device, verb.backend, verb.resume, verb.preset) == ("cpu", "reference", True, "small")
    assert (verb.config.max_steps, verb.config.seed, verb.config.save_every) == (7, 3, 9)
    # Everything else is the preset's.
    assert verb.config.model == PRESETS["small"].model
    assert verb.config.lr_init == PRESETS["small"].lr_init


def test_without_a_run_dir_a_new_one_is_named(
    tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")
    train = ["train", "--data", str(scene), "--preset", "small", "--max-steps", "1", "--batch-size", "4"]
    assert cli.main(train) == cli.main(train) == cli.DONE
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["scene-small-20260101-120000", "scene-small-20260101-120000-2"]


def test_resume_needs_a_run_dir(tmp_path: Path, scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs --run-dir" in refused(capsys, tmp_path, "train", "--data", scene, "--resume")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_alone_is_that_preset(name: str) -> None:
    for flags in (["--preset", name], [f"--preset={name}"]):
        verb = cli.parse(["train", "--data", "demo", "--run-dir", "x", *flags])
        assert isinstance(verb, cli.Train)
        assert verb.config == PRESETS[name]


def test_the_model_can_be_changed() -> None:
    start = ["train", "--data", "demo", "--run-dir", "x"]
    verb = cli.parse([*start, "--preset", "paper", "--num-samples", "16", "--batch-size", "64"])
    assert isinstance(verb, cli.Train)
    assert verb.config.model == MipNerfConfig(num_samples=16)
    assert verb.config.batch_size == 64
    verb = cli.parse([*start, "--preset", "nerf", "--num-fine", "32"])
    assert isinstance(verb, cli.Train)
    assert verb.config.model == NerfConfig(num_fine=32)


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("eval --run-dir r --data d --split val --downscale 2", cli.Eval(Path("r"), "d", "val", 2)),
        ("render --run-dir r --path zoom --frames 5", cli.Render(Path("r"), "zoom", 5)),
        ("export --run-dir r --threshold 3", cli.Export(Path("r"), threshold=3.0)),
        ("convert --data demo --out o --downscale 4 --levels 1", cli.Convert("demo", Path("o"), 4, 1)),
        ("info --json f", cli.Info(Path("f"))),
    ],
)
def test_other_verbs(line: str, want: cli.Verb) -> None:
    assert cli.parse(line.split()) == want


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ["train", "eval", "render", "export", "convert", "info"]),
        ("trian", ["trian"]),
        ("train", ["--data"]),
        ("train --data demo --run-dir x --batch-sizes 3", ["--batch-sizes"]),
        ("train --data demo --run-dir x --batch-size many", ["--batch-size", "many"]),
        ("train --data demo --run-dir x --preset", ["--preset"]),
        ("train --data demo --run-dir x --preset huge", ["--preset", "huge", "paper", "small"]),
        ("train --data demo --run-dir x --max-steps 0", ["max_steps", "at least 1", "0"]),
        ("train --data demo --run-dir x --num-samples 0", ["num_samples", "at least 1", "0"]),
        ("train --data demo --run-dir x --lr-init -1", ["lr_init", "positive", "-1"]),
        (
            "train --data demo --run-dir x --preset fast --grad-max-norm 1",
            ["grad_max_norm", "1.0", "fast model"],
        ),
        ("train --data demo --run-dir x --preset fast --loss mse", ["loss", "'mse'", "smooth L1"]),
        ("train --data demo --run-dir x --preset fast --batching single_image", ["batching", "single_image"]),
        ("train --data demo --run-dir x --max-minutes -1", ["--max-minutes", "positive", "-1"]),
        ("train --data demo --run-dir x --max-minutes 0", ["--max-minutes", "positive", "0"]),
        ("train --data demo --run-dir x --device tpu", ["--device", "tpu", "cpu"]),
        ("train --data demo --run-dir x --downscale 3", ["downscale", "3", "power of two"]),
        ("train --data nowhere --run-dir x", ["nowhere", "demo"]),
        ("eval --run-dir nowhere", ["--run-dir", "nowhere"]),
        ("render --run-dir nowhere --path zoom", ["--run-dir", "nowhere"]),
        ("render --run-dir nowhere --path around", ["--path", "around", "turntable"]),
        ("export --run-dir nowhere", ["--run-dir", "nowhere"]),
        ("convert --data nowhere --out x", ["nowhere"]),
        ("convert --data demo --out x --levels 0", ["levels", "0"]),
        ("info --device tpu", ["--device", "tpu"]),
    ],
)
def test_bad_usage(
    line: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = refused(capsys, tmp_path, *line.split())
    assert [word for word in words if word not in sentence] == []


def test_help_is_made_of_the_field_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "Scene folder",
        "Rays per step",
        "Intervals per ray and level",
        "--batch-size",
        "no-ipe: ablation",
    ):
        assert words in text
    assert cli.main(["--help"]) == 0
    assert all(verb in capsys.readouterr().out for verb in ("train",))


def test_cuda_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = ["train", "--data", "demo", "--run-dir", tmp_path / "run", "--device", "cuda"]
    assert "sees no GPU" in refused(capsys, tmp_path, *line)


# bad scenes


def edit_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(scene: Path) -> None:
        path = scene / "transforms_train.json"
        contents = json.loads(path.read_text())
        change(contents)
        path.write_text(json.dumps(contents))

    return edit


BAD_SCENES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing JSON": (lambda scene: (scene / "transforms_train.json").unlink(), ["transforms_train.json"]),
    "broken JSON": (
        lambda scene: (scene / "transforms_train.json").write_text('{"frames": ['),
        ["transforms_train.json", "not valid JSON"],
    ),
    "no frames": (edit_json(lambda scene: scene.pop("frames")), ["transforms_train.json", "frames"]),
    "empty frames": (
        edit_json(lambda scene: scene["frames"].clear()),
        ["transforms_train.json", "frames", "empty"],
    ),
    "no image": (lambda scene: (scene / "train" / "r_1.png").unlink(), ["train/r_1"]),
    "corrupt image": (
        lambda scene: (scene / "train" / "r_1.png").write_bytes(b"\x89PNG nonsense"),
        ["r_1.png"],
    ),
    "truncated image": (
        lambda scene: (scene / "train" / "r_1.png").write_bytes(
            (scene / "train" / "r_1.png").read_bytes()[:60]
        ),
        ["r_1.png"],
    ),
    "grey image": (
        lambda scene: Image.new("L", (8, 8)).save(scene / "train" / "r_1.png"),
        ["r_1.png", "RGB"],
    ),
    "mixed channels": (
        lambda scene: Image.new("RGB", (8, 8)).save(scene / "train" / "r_1.png"),
        ["r_1.png", "3 channels"],
    ),
    "zero camera": (
        edit_json(lambda scene: scene["frames"][1].update(transform_matrix=[[0.0] * 4] * 4)),
        ["transforms_train.json", "frames[1]", "transform_matrix"],
    ),
    "NaN camera": (
        edit_json(lambda scene: scene["frames"][1]["transform_matrix"][0].__setitem__(3, float("nan"))),
        ["transforms_train.json", "frames[1]", "transform_matrix", "NaN"],
    ),
    "matrix of another shape": (
        edit_json(lambda scene: scene["frames"][1].update(transform_matrix=[[1.0, 2.0]])),
        ["frames[1]", "transform_matrix", "4 x 4"],
    ),
    "zero angle": (edit_json(lambda scene: scene.update(camera_angle_x=0.0)), ["camera_angle_x", "0"]),
    "NaN angle": (
        edit_json(lambda scene: scene.update(camera_angle_x=float("nan"))),
        ["camera_angle_x", "nan"],
    ),
    "no angle": (edit_json(lambda scene: scene.pop("camera_angle_x")), ["camera_angle_x"]),
}


@pytest.mark.parametrize(
    ("verb", "case"),
    [
        (verb, case)
        for verb in ("train", "convert")
        for case in BAD_SCENES
        # What has no training split can still be converted.
        if (verb, case) != ("convert", "missing JSON")
    ],
)
def test_bad_scenes(case: str, verb: str, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spoil, words = BAD_SCENES[case]
    spoil(scene)
    out = tmp_path / "out"
    if verb == "convert":
        line: list[object] = ["convert", "--data", scene, "--out", out, "--levels", 2]
    else:
        line = ["train", "--data", scene, "--preset", "small", "--run-dir", out, "--max-steps", 1]
    sentence = refused(capsys, tmp_path, *line)
    assert [word for word in words if word not in sentence] == []
    assert not out.exists()


def test_downscale_that_does_not_divide(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = ["train", "--data", scene, "--preset", "small", "--run-dir", tmp_path / "run", "--downscale", 16]
    assert "8 x 8" in refused(capsys, tmp_path, *line)


# bad places


def test_output_under_a_file(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    train = ["train", "--data", scene, "--preset", "small", "--run-dir", tmp_path / "file" / "run"]
    assert "file" in refused(capsys, tmp_path, *train)
    assert "file" in refused(capsys, tmp_path, "convert", "--data", scene, "--out", tmp_path / "file" / "x")


def test_no_space_left_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(verb: cli.Info) -> int:
        raise OSError(28, "No space left on device", "/disk/full.png")

    monkeypatch.setitem(cli._RUN, cli.Info, full)
    assert refused(capsys, tmp_path, "info") == "mipnerf-fast: /disk/full.png: No space left on device"


def test_run_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, tmp_path, "eval", "--run-dir", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "config.json" in refused(capsys, tmp_path, "eval", "--run-dir", tmp_path / "empty")


def test_bad_chunks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "--chunk-rays" in refused(capsys, tmp_path, "eval", "--run-dir", tmp_path, "--chunk-rays", 0)


# info, interruption, entry points


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json", str(tmp_path / "new" / "info.json")]) == 0
    text = capsys.readouterr().out
    facts = json.loads((tmp_path / "new" / "info.json").read_text())
    exact, fast = (
        {"ray_batch", "frustum_ipe", "composite", "resample", "mlp"},
        set(ops.FAST_OPERATIONS),
    )
    assert set(facts["operations"]) == exact | fast
    for name, entry in facts["operations"].items():
        assert entry["used"] in ("native", "reference", "unavailable")
        assert entry["why"]
        assert entry["model"] == ("fast" if name in fast else "exact")
        assert f"{entry['model']} model: {name} " in text
        assert entry["why"] in text
    assert set(facts["mlp_engines"]) == set(ops.MLP_BACKENDS) - {"auto"}
    for name, engine in facts["mlp_engines"].items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"mlp engine: {name} ")]
        assert line.endswith(f"  {engine['state']}: {engine['why']}") and engine["why"]
    assert facts["torch"] == torch.__version__
    assert facts["version"] in text
    assert bool(facts["native_library"]) != bool(facts["native_library_missing"])


def test_info_says_what_the_backend_forces(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--backend", "reference"]) == 0
    # And the network's engine that it forces.
    assert capsys.readouterr().out.count("the backend is set to reference") == 1 + len(
        ops.OPERATIONS + ops.FAST_OPERATIONS
    )


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(verb: cli.Info) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._RUN, cli.Info, stop)
    assert cli.main(["info"]) == cli.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_warnings_are_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    def warn(verb: cli.Info) -> int:
        warnings.warn("step_2 is truncated; using step_1 instead", stacklevel=2)
        return 0

    monkeypatch.setitem(cli._RUN, cli.Info, warn)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "mipnerf-fast: warning: step_2 is truncated; using step_1 instead\n"


def test_without_tyro(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert "pip install tyro" in refused(capsys, tmp_path, "info")


def test_the_package_imports_without_the_command_lines_packages() -> None:
    blocked = (
        "tyro",
        "tensorboard",
        "imageio",
        "imageio_ffmpeg",
        "matplotlib",
        "skimage",
        "trimesh",
        "lpips",
    )
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "import mipnerf_fast, mipnerf_fast.training, mipnerf_fast.rendering, mipnerf_fast.evaluation\n"
        "import mipnerf_fast.export, mipnerf_fast.plots, mipnerf_fast.cli"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        (["-m", "mipnerf_fast.cli", "info"], 0, "torch"),
        (["train.py", "--preset", "huge"], 2, "huge"),
    ],
)
def test_entry_points(command: list[str], status: int, words: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
