"""The command `mipnerf-fast`: a verb per task, configured by dataclasses whose field docs are the help."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from .config import PRESET_NOTES, PRESETS, TrainConfig, preset
from .errors import AgreedError, InputError, PeerLostError

if TYPE_CHECKING:
    import torch

    from .checkpoint import CheckpointInfo
    from .data.dataset import Dataset
    from .model import Model

PROGRAM = "mipnerf-fast"
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

Device = Literal["auto", "cpu", "cuda"]
Backend = Literal["auto", "native", "reference"]
Split = Literal["train", "val", "test"]
Checkpoint = Literal["latest", "best"]
Mode = Literal["exact", "fast"]


@dataclass(frozen=True)
class Train:
    """Train a model on a scene; every option below the first group overrides the preset."""

    data: str
    """Scene folder (Blender, or multi-scale Blender), or "demo" for the built-in scene."""
    run_dir: Path | None = None
    """Folder of the run: configuration, metrics, curves, checkpoints, previews; by default a new one,
    runs/SCENE-PRESET-TIME."""
    preset: str = "paper"
    """Where the configuration starts from; see the list below."""
    downscale: int = 1
    """Make the images so many times smaller on load: 1, 2, 4, 8, ..."""
    background: Literal["white", "black"] = "white"
    """Behind transparent pixels."""
    max_minutes: float | None = None
    """End after this much training time and stretch the learning-rate schedule over it."""
    device: Device = "auto"
    """Where to train; auto: a GPU where there is one."""
    backend: Backend = "auto"
    """Native kernels or the plain-PyTorch reference; auto: native where a kernel serves."""
    resume: bool = False
    """Continue from the run folder's last checkpoint."""
    config: TrainConfig = field(default_factory=TrainConfig)
    """Everything else."""


@dataclass(frozen=True)
class Eval:
    """Evaluate a run: PSNR, SSIM, LPIPS and average error, per scale and mean, to RUN/eval."""

    run_dir: Path
    """Folder of the run."""
    data: str | None = None
    """Other data than the run's own: a scene folder, or "demo"."""
    split: Split = "test"
    """Which views."""
    downscale: int | None = None
    """Another downscale factor than the run's own."""
    checkpoint: Checkpoint = "latest"
    """Which one: the latest, or the best on the test sample."""
    images: bool = False
    """Also write the predictions as PNG, to RUN/eval/images."""
    device: Device = "auto"
    """Where to render."""
    backend: Backend = "auto"
    """Native kernels or the reference."""
    chunk_rays: int | None = None
    """Rays at once; by default as many as fit."""
    mode: Mode = "exact"
    """fast: leave out what contributes less than half an 8-bit level, and print the error that this makes."""


@dataclass(frozen=True)
class Render:
    """Render a camera path to PNG sequences and videos in RUN/render/PATH."""

    run_dir: Path
    """Folder of the run."""
    path: Literal["test", "turntable", "spiral", "zoom"]
    """test: the views of the split. turntable: once around. spiral: twice around, rising. zoom: back to eight times
    the distance, where whatever is not integrated over a pixel aliases."""
    frames: int | None = None
    """How many; by default all views of the split, or 60 (turntable), 90 (spiral), 60 (zoom)."""
    kinds: tuple[Literal["rgb", "depth", "opacity", "normals"], ...] = ("rgb", "depth", "opacity", "normals")
    """What to draw."""
    fps: float = 30.0
    """Frames per second of the videos."""
    data: str | None = None
    """Other data than the run's own, for its cameras."""
    split: Split = "test"
    """Whose cameras to go by."""
    downscale: int | None = None
    """Another downscale factor than the run's own: larger or smaller pictures."""
    checkpoint: Checkpoint = "latest"
    """Which one: the latest, or the best on the test sample."""
    device: Device = "auto"
    """Where to render."""
    backend: Backend = "auto"
    """Native kernels or the reference."""
    chunk_rays: int | None = None
    """Rays at once; by default as many as fit."""
    mode: Mode = "exact"
    """fast: leave out what contributes less than half an 8-bit level, and print the error that this makes."""


@dataclass(frozen=True)
class Export:
    """Export the density grid (npz) and the surface with vertex colours (PLY, GLB) to RUN/export."""

    run_dir: Path
    """Folder of the run."""
    formats: tuple[Literal["ply", "glb", "npz"], ...] = ("ply", "glb", "npz")
    """Which files: mesh.ply, mesh.glb, density.npz."""
    resolution: int = 128
    """Grid points along the longest side of the box."""
    threshold: float | None = None
    """Density at the surface, per world unit; by default from the data (Otsu's method on opacities)."""
    box: tuple[float, float, float, float, float, float] | None = None
    """Lower then upper corner in world units; by default the cube that nearly every camera sees."""
    data: str | None = None
    """Other data than the run's own, for the box."""
    split: Split = "test"
    """Whose cameras decide the box."""
    downscale: int | None = None
    """Another downscale factor than the run's own."""
    checkpoint: Checkpoint = "latest"
    """Which one: the latest, or the best on the test sample."""
    device: Device = "auto"
    """Where to compute."""
    backend: Backend = "auto"
    """Native kernels or the reference."""
    chunk_points: int = 32768
    """Points at once."""


@dataclass(frozen=True)
class Convert:
    """Write a Blender scene, or the built-in one, in the multi-scale layout; with --levels 1, as a smaller scene."""

    data: str
    """Scene folder, or "demo" for the built-in scene."""
    out: Path
    """Folder to make; it appears when complete."""
    downscale: int = 1
    """Make everything so many times smaller first: 1, 2, 4, 8, ..."""
    levels: int = 4
    """Levels of the pyramid; 1 writes an ordinary scene."""


@dataclass(frozen=True)
class Info:
    """Print versions, what the native library was built for, and the backend of every operation and why."""

    json: Path | None = None
    """Also write it all to this file."""
    device: Device = "auto"
    """Whose kernels to report."""
    backend: Backend = "auto"
    """As for the other verbs."""


@dataclass(frozen=True)
class Verify:
    """Compare every operation on this machine with the float64 reference; fails where an error exceeds its bound."""

    json: Path | None = None
    """Also write the table to this file, and as Markdown beside it (.md)."""
    device: Device = "auto"
    """What to check; auto: the CPU, and the GPU where there is one."""


Verb = Train | Eval | Render | Export | Convert | Verify | Info


def _scene(run: dict[str, Any], verb: Eval | Render | Export) -> Dataset:
    """The data of a run, or what the flags name instead."""
    from .data import load_dataset

    return load_dataset(
        verb.data or run["data"],
        verb.split,
        run["background"],
        verb.downscale or run["downscale"],
    )


def _load(
    verb: Eval | Render | Export, out: Path, device: torch.device | None = None
) -> tuple[Model, dict[str, Any], CheckpointInfo, torch.device]:
    from .backend import configure_backend
    from .checkpoint import load_model
    from .environment import choose_device
    from .run_folder import check_writable

    if isinstance(verb, (Eval, Render)) and verb.chunk_rays is not None and verb.chunk_rays < 1:
        raise InputError(f"--chunk-rays: must be at least 1, got {verb.chunk_rays}")
    if not verb.run_dir.is_dir():
        raise InputError(f"--run-dir: there is no folder {verb.run_dir}")
    check_writable(out)
    configure_backend(verb.backend)
    device = device or choose_device(verb.device)
    model, run, checkpoint = load_model(verb.run_dir, device, verb.checkpoint)
    return model.eval(), run, checkpoint, device


def _new_run_dir(data: str, preset: str) -> Path:
    """A folder that no run uses yet, named so that a listing of runs/ reads as a diary."""
    stem = f"{Path(data).resolve().name}-{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{k}" for k in itertools.count(2)))
    return next(path for path in (Path("runs", name) for name in names) if not path.exists())


def run_train(verb: Train) -> int:
    """`mipnerf-fast train`."""
    from .training import run_training

    if verb.max_minutes is not None and not verb.max_minutes > 0:
        raise InputError(f"--max-minutes: must be positive, got {verb.max_minutes}")
    if verb.resume and verb.run_dir is None:
        raise InputError("--resume: needs --run-dir, the folder of the run to continue")
    result = run_training(
        verb.data,
        verb.config,
        verb.preset,
        verb.run_dir or _new_run_dir(verb.data, verb.preset),
        downscale=verb.downscale,
        background=verb.background,
        max_minutes=verb.max_minutes,
        device=verb.device,
        backend=verb.backend,
        resume=verb.resume,
    )
    return INTERRUPTED if result.interrupted else DONE


def run_eval(verb: Eval) -> int:
    """`mipnerf-fast eval`."""
    from .environment import choose_device
    from .evaluation import evaluate, terminal_table, write_reports
    from .ranks import join_ranks

    folder = verb.run_dir / "eval"
    pictures = folder / "images" if verb.images else None

    def clear() -> None:
        if pictures is not None and pictures.exists():
            shutil.rmtree(pictures)

    with join_ranks(choose_device(verb.device)) as (ranks, device):
        model, run, checkpoint, _ = ranks.together(lambda: _load(verb, folder, device))
        data = ranks.together(lambda: _scene(run, verb))
        ranks.from_first(clear)
        evaluation = evaluate(
            model,
            data,
            steps=checkpoint.step,
            seconds=checkpoint.seconds,
            chunk_rays=verb.chunk_rays,
            pictures=pictures,
            mode=verb.mode,
            ranks=ranks,
        )
    if ranks.is_writer:
        print(terminal_table(evaluation))
        print(f"\nwritten: {', '.join(map(str, write_reports(evaluation, folder)))}")
    return DONE


def run_render(verb: Render) -> int:
    """`mipnerf-fast render`."""
    from .camera_paths import camera_path
    from .rendering import render_path

    folder = verb.run_dir / "render" / verb.path
    model, run, _, _ = _load(verb, folder)
    data = _scene(run, verb)
    cameras = camera_path(verb.path, data, verb.frames)
    lines = render_path(
        model,
        cameras,
        folder,
        kinds=verb.kinds,
        white_background=data.white_background,
        chunk_rays=verb.chunk_rays,
        frames_per_second=verb.fps,
        mode=verb.mode,
    )
    print("\n".join(lines))
    return DONE


def run_export(verb: Export) -> int:
    """`mipnerf-fast export`."""
    import numpy as np

    from . import export
    from .camera_paths import surroundings

    if not verb.formats:
        raise InputError(f"--formats: expected some of {', '.join(export.FORMATS)}")
    meshes = [name for name in verb.formats if name != "npz"]
    if meshes or verb.threshold is None:
        export.require_export_packages()
    folder = verb.run_dir / "export"
    model, run, _, _ = _load(verb, folder)
    if verb.box is not None:
        low, high = np.array(verb.box[:3]), np.array(verb.box[3:])
    else:
        low, high = export.default_box(surroundings(_scene(run, verb)))
    grid = export.density_grid(model, low, high, verb.resolution, verb.chunk_points)
    threshold = export.choose_threshold(grid, verb.threshold)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"density {threshold.value:.4g} per world unit at the surface ({threshold.rule})")
    if "npz" in verb.formats:
        export.write_grid(folder / "density.npz", grid, threshold)
        print(f"grid: {folder / 'density.npz'}, {' x '.join(map(str, grid.density.shape))}")
    if meshes:
        mesh = export.extract_mesh(model, grid, threshold)
        for kind in meshes:
            export.write_mesh(folder / f"mesh.{kind}", mesh)
            size = f"{len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles"
            print(f"mesh: {folder / f'mesh.{kind}'}, {size}")
    return DONE


def run_convert(verb: Convert) -> int:
    """`mipnerf-fast convert`."""
    from .data import multiscale

    print(f"written: {multiscale.convert(verb.data, verb.out, verb.downscale, verb.levels)}")
    return DONE


def information(device_flag: str = "auto") -> dict[str, Any]:
    """What `info` reports, JSON-ready."""
    import numpy
    import torch

    from . import __version__, _native, ops
    from .backend import current_backend
    from .environment import choose_device, cpu_name, device_name, revision

    device = choose_device(device_flag)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    built = _native.build_info()
    return {
        "version": __version__,
        "revision": revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "numpy": numpy.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "vector_unit": _native.vector_unit() or None,
        "gpus": gpus,
        "device": device_name(device),
        "native_library": built or None,
        "native_library_missing": _native.why_missing() or None,
        "architectures": list(built.get("architectures", [])),
        "backend": current_backend(),
        "operations": {
            entry.operation: {
                "model": "fast" if entry.operation in ops.FAST_OPERATIONS else "exact",
                "used": entry.used,
                "why": entry.why,
            }
            for entry in ops.implementations(device)
        },
        "mlp_engines": {
            entry.engine: {"state": entry.state, "why": entry.why} for entry in ops.mlp_engines(device)
        },
    }


def run_info(verb: Info) -> int:
    """`mipnerf-fast info`."""
    from .backend import configure_backend

    configure_backend(verb.backend)
    facts = information(verb.device)
    built = facts["native_library"] or {}
    architectures = " ".join(map(str, facts["architectures"])) or "none (CPU alone)"
    library = f"built: {built.get('reason', '')}" if built else facts["native_library_missing"]
    kernels = facts["vector_unit"] or "none"
    if built and len(built["vector_units"]) == 1:
        kernels += " alone (built with MIPNERF_FAST_VECTOR_UNITS=host)"
    lines = [
        ("mipnerf_fast", f"{facts['version']}, revision {facts['revision']}"),
        ("python", f"{facts['python']}, {facts['platform']}"),
        ("torch", f"{facts['torch']}, CUDA {facts['torch_cuda'] or 'none'}; numpy {facts['numpy']}"),
        ("CPU", f"{facts['cpu']}, {facts['threads']} threads, kernels for {kernels}"),
        ("GPU", ", ".join(facts["gpus"]) or "none visible to torch"),
        ("native library", library),
        ("CUDA architectures", architectures if built else "none"),
        ("backend", facts["backend"]),
    ]
    lines += [
        (f"{entry['model']} model: {name}", f"{entry['used']}: {entry['why']}")
        for name, entry in facts["operations"].items()
    ]
    lines += [
        (f"mlp engine: {name}", f"{entry['state']}: {entry['why']}")
        for name, entry in facts["mlp_engines"].items()
    ]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in lines))
    if verb.json is not None:
        from .durable_files import write_durably

        verb.json.parent.mkdir(parents=True, exist_ok=True)
        write_durably(verb.json, (json.dumps(facts, indent=2) + "\n").encode())
    return DONE


def run_verify(verb: Verify) -> int:
    """`mipnerf-fast verify`."""
    from . import verification
    from .environment import choose_device
    from .run_folder import check_writable

    for path in [verb.json, verb.json.with_suffix(".md")] if verb.json else []:
        check_writable(path.parent)
        if path.is_dir():
            raise InputError(f"--json: {path} is a folder")
    chosen = choose_device(verb.device).type
    devices = [chosen] if verb.device != "auto" or chosen == "cpu" else ["cpu", chosen]
    report = verification.verify(devices)
    print(verification.markdown(report))
    if verb.json is not None:
        from .durable_files import write_durably

        verb.json.parent.mkdir(parents=True, exist_ok=True)
        write_durably(verb.json, (json.dumps(verification.to_dict(report), indent=2) + "\n").encode())
        write_durably(verb.json.with_suffix(".md"), (verification.markdown(report) + "\n").encode())
    return DONE if report.passed else FAILED


_RUN: dict[type[Any], Callable[[Any], int]] = {
    Train: run_train,
    Eval: run_eval,
    Render: run_render,
    Export: run_export,
    Convert: run_convert,
    Verify: run_verify,
    Info: run_info,
}


def _run(verb: Verb) -> int:
    """Do it; what computes on the CPU does so in a process set up for that (training sees to it itself)."""
    setup: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if isinstance(verb, (Eval, Render, Export)):
        from .cpu_setup import cpu_setup

        setup = cpu_setup()
    with setup:
        return _RUN[type(verb)](verb)


def _preset_named(argv: list[str]) -> str:
    """The value of --preset, read ahead so that its configuration can be the default of all other flags."""
    name = "paper"
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag == "--preset":
            name = value
        elif flag.startswith("--preset="):
            name = flag.partition("=")[2]
    return name


def parse(argv: list[str]) -> Verb:
    """The verb and its options.

    Errors: InputError for bad usage; SystemExit(0) after --help.
    """
    try:
        import tyro
    except ImportError:
        raise InputError(
            "the command line needs the package tyro; install it with: pip install tyro"
        ) from None

    missing: Any = tyro.MISSING
    start = preset(_preset_named(argv)) if argv[:1] == ["train"] else PRESETS["paper"]
    about = Train.__doc__ or ""
    if argv[:1] == ["train"]:
        about += "\n\nPresets:\n" + "".join(f"\n- {name}: {note}" for name, note in PRESET_NOTES.items())
    train = tyro.conf.subcommand(
        "train",
        default=Train(missing, config=start),
        description=about,
    )
    others = {
        "eval": Eval,
        "render": Render,
        "export": Export,
        "convert": Convert,
        "verify": Verify,
        "info": Info,
    }
    verbs: Any = Union[
        (
            Annotated[Train, train],
            *(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in others.items()),
        )
    ]
    options = (
        tyro.conf.AvoidSubcommands,
        tyro.conf.OmitArgPrefixes,
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.FlagCreatePairsOff,
    )
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            result: Verb = tyro.cli(verbs, args=argv, prog=PROGRAM, config=options)
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise InputError(_one_sentence(complaint.getvalue())) from None
    return result


def _one_sentence(boxed: str) -> str:
    """What is wrong, from an error that tyro drew in a box over several lines and paragraphs."""
    boxed = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    lines = [line.strip(" │|") for line in boxed.splitlines()]
    if "╭" not in boxed:
        # Where the output cannot show a frame, the title is a paragraph of its own.
        first = next((i for i, line in enumerate(lines) if line and set(line) == {"-"}), -1)
        lines = lines[first + 1 :]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if set(line) <= set("─-")), len(lines))
    text = " ".join(lines[:rule])
    if text.startswith("Missing from"):
        flags = [line.split()[0] for line in lines[:rule] if line.startswith("--")]
        text = f"{lines[0].removesuffix(':')}: {', '.join(flags)}"
    # What a configuration's own checks say needs no path of the parser's in front.
    text = re.sub(r"^Error parsing [\w.-]*config[\w.-]*: ", "", text)
    return f"{text} (try --help)"


def _complain(message: str) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a line, without the place in the source that raised it."""
    print(f"{PROGRAM}: warning: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: without the program's name; None: sys.argv.

    Returns:
        The exit status: 0 done, 1 failed, 2 bad input or usage (one sentence on standard error), 130 interrupted.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        verb = parse(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return _run(verb)
    except AgreedError as error:
        # All processes of a job know; one says it.
        return _complain(str(error)) if os.environ.get("RANK", "0") == "0" else BAD_INPUT
    except InputError as error:
        return _complain(str(error))
    except PeerLostError as error:
        from .ranks import left_in_disorder

        _complain(str(error))
        if left_in_disorder():
            sys.stderr.flush()
            os._exit(FAILED)
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _complain(f"{where}{error.strerror or error}")
    except SystemExit as exit_:
        return DONE if exit_.code is None else int(exit_.code)
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
