"""The benchmarks of the fast model: what they time is right; their tables say what was measured, and what was not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import write_scene
from torch import Tensor

from benchmarks import (
    bench_draw_rays,
    bench_fast_quality,
    bench_fast_step,
    bench_occupancy,
    bench_sparse_adam,
    fast_parts,
    fast_scene,
)
from benchmarks.harness import Case, Inputs, largest_error
from mipnerf_fast import cli, fast_reference, ops, preset
from mipnerf_fast.config import FastConfig
from mipnerf_fast.data import multiscale
from mipnerf_fast.ops.fast_captured import StepClock
from mipnerf_fast.ops.fast_step import FastFields, FastGradients, MarchRays
from mipnerf_fast.training import run_training

RESULTS = bench_fast_quality.RESULTS


CASES: dict[str, Callable[[torch.device], Case]] = {
    "training step": lambda device: bench_fast_step.training(64, device),
    "rendering": lambda device: bench_fast_step.rendering(64, device),
    "draw_rays": lambda device: bench_draw_rays.case(256, device),
    "occupancy": lambda device: bench_occupancy.case(64, 0.8, device),
    "sparse_adam": lambda device: bench_sparse_adam.case(0.1, device),
}


@pytest.mark.parametrize("name", CASES)
def test_every_variant_is_as_right_as_its_reference(device: torch.device, name: str) -> None:
    """On a GPU the captured step and its roundings too; elsewhere a row says why not."""
    case = CASES[name](device)
    first, error = case.make_inputs(0, device), case.error or largest_error
    kept = {key: value.clone() for key, value in first.items()}
    truth = case.truth(first)
    variants = case.variants()
    assert list(variants)[:2] == ["eager", "native"]
    for variant, run in variants.items():
        bound = 2 * error(case.references.get(variant, case.reference)(first), truth) + case.floor
        assert error(run(first), truth) <= bound, variant
    assert all(torch.equal(first[key], value) for key, value in kept.items())
    assert case.items > 0 and case.moved_bytes > 0
    of_gpus = {
        "training step": {bench_fast_step.CAPTURED: "a CUDA graph needs a GPU"},
        "rendering": {bench_fast_step.AS_RENDERED: "the CPU's tables are float32"},
        "sparse_adam": {bench_sparse_adam.WITH_COPY: "it is of a GPU's captured step"},
    }.get(name, {})
    assert case.not_run == (of_gpus if device.type == "cpu" else {})
    assert set(variants) == {"eager", "native", *(of_gpus if device.type != "cpu" else {})}


def test_every_operation_of_the_fast_model_has_a_benchmark() -> None:
    assert {f"bench_{name}.py" for name in ops.FAST_OPERATIONS} <= {p.name for p in RESULTS.parent.iterdir()}


def test_an_adam_that_goes_on_from_what_it_left_changes_no_input() -> None:
    case = bench_sparse_adam.case(0.1, torch.device("cpu"))
    inputs = case.make_inputs(0, torch.device("cpu"))
    before = {name: value.clone() for name, value in inputs.items()}
    run = case.variants()["native"]
    once = run(inputs)["values"].clone()
    twice = run(inputs)["values"]
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    touched = (inputs["gradient"] != 0).any(-1)
    assert 0.05 < touched.float().mean() < 0.15
    assert torch.equal(once[~touched], inputs["values"][~touched])
    assert not torch.equal(once[touched], twice[touched])


class Graph:
    """Stands in for a CUDA graph: replays by calling the function again."""

    launch: Any = None

    def replay(self) -> None:
        self.launch()


def captured_on_cpu(
    rays: MarchRays,
    target: Tensor,
    clock: StepClock,
    capacity: int,
    loss_beta: float,
    fields: FastFields,
    gradients: FastGradients,
    sums: Tensor | None = None,
) -> Tensor:
    """Stands in for the captured step: that of the CPU, with the float16 tables as float32."""
    assert fields.tables.dtype == torch.float16 and sums is None and capacity % 64 == 0
    count = int(clock.active_rays)
    marched = MarchRays(*(None if field is None else field[:count] for field in rays))  # type: ignore[arg-type]
    exact = fast_scene.for_reference(fields)
    found = ops.fast_train_step(marched, target[:count], loss_beta, exact, gradients)
    assert found.samples <= capacity
    return torch.tensor([*found, count], dtype=torch.float64)


def test_the_replayed_step_is_the_step_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def recording(graph: Graph) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(bench_fast_step, "fast_train_step_captured", captured_on_cpu)
    rounded = fast_scene.as_on_gpu(fast_scene.model(), torch.device("cpu"))
    step = bench_fast_step.ReplayedStep(rounded, 20_000)
    monkeypatch.setattr(Graph, "launch", lambda _: step._launch())
    plain = bench_fast_step._stepping(fast_reference.fast_train_step, fast_scene.for_reference(rounded))
    seen: list[float] = []
    for seed in (0, 1, 0):
        inputs: Inputs = fast_scene.rays(seed, 64)
        found, wanted = step(inputs), plain(inputs)
        # Both are float32, of gradients below 0.01 and a loss of some tenths.
        assert largest_error(found, {name: value.double() for name, value in wanted.items()}) < 1e-6
        seen.append(float(found["loss"]))
    assert seen[0] == seen[2] != seen[1]


# ---------------------------------------------------------------------------------------------------- the parts


def test_the_preset_for_a_gpu_differs_in_sizes_alone() -> None:
    small, large = preset("fast"), preset("fast-gpu")
    assert isinstance(small.model, FastConfig) and isinstance(large.model, FastConfig)
    assert dataclasses.replace(large.model, colour_layers=1) == small.model
    sizes = ("batch_size", "max_steps", "save_every", "test_every", "print_every")
    assert dataclasses.replace(large, model=small.model, **{n: getattr(small, n) for n in sizes}) == small
    assert (large.batch_size, large.model.colour_layers) == (262_144, 2)
    # Time ends the runs that are measured: so many steps are five minutes at the 0.3 ms of the design's floor.
    assert large.max_steps * 0.3 >= 300 * 1000
    sized = large.model.for_images(800)
    assert (sized.levels, sized.features, sized.finest_resolution, sized.log2_table_size) == (8, 4, 1600, 19)


def test_the_rate_counts_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_fast_training import _spheres

    monkeypatch.setattr(bench_fast_quality, "SPEED_SECONDS", 0.3)
    part = fast_parts.PARTS["cpu"]["multi"]
    found = bench_fast_quality.training_rate(part, _spheres(24, 4), torch.device("cpu"), warm_up=3)
    assert found["steps"] > 0 and found["wall_seconds"] >= 0.3
    assert found["samples"] > found["rays"] >= 192 * found["steps"]
    for name in ("steps", "samples", "rays"):
        assert found[f"{name}_per_second"] == pytest.approx(found[name] / found["wall_seconds"])


def test_the_gpu_s_speed_is_of_a_run_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it does beside CUDA's own counters, on the CPU and small."""
    cpu, runs = torch.device("cpu"), tmp_path / "runs"
    data = write_scene(tmp_path / "lego", size=16)
    with pytest.raises(SystemExit, match=r"a frame needs a run in .*, of minute or five"):
        bench_fast_quality.speed_on_gpu(data, runs, cpu)
    scene = multiscale.convert(str(data), runs / "lego_4_from_1", 1, 4)
    config = dataclasses.replace(preset("fast-gpu"), batch_size=2048, max_steps=3, test_every=0)
    run_training(str(scene), config, "fast-gpu", runs / "minute")
    monkeypatch.setattr(bench_fast_quality, "SPEED_SECONDS", 0.2)
    monkeypatch.setattr(bench_fast_quality, "WARM_UP_STEPS", 1)
    found = bench_fast_quality.speed_on_gpu(data, runs, cpu)
    assert found["scene"] == "lego" and found["preset"] == "fast-gpu" and found["training"]["steps"] > 0
    assert {"run": "minute", "views": 4, "height": 16, "width": 16}.items() <= found["view"].items()
    (tmp_path / "fast_speed_cuda.json").write_text(json.dumps(found))
    table = fast_parts.targets_table(tmp_path, "cuda")
    assert "16 x 16 frame | at most 5 ms |" in table and "not judged" not in table


def test_parts_are_named_and_a_gpu_is_needed_where_one_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    for flags, message in (
        (["--only", "five"], "--only five: on cpu the parts are single, multi, aliased, full, speed"),
        (["--device", "cuda", "--only", "full"], "on cuda the parts are minute, five, speed"),
        (["--only", "single"], "--data: needed"),
        *(
            []
            if torch.cuda.is_available()
            else [(["--device", "cuda", "--data", "demo"], "--device cuda: torch")]
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            bench_fast_quality.main([*out, *flags])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_part_is_trained_and_evaluated_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line that it runs is one that parses, and says what the part says."""
    verbs: list[Any] = []

    def run(arguments: list[str]) -> dict[str, float]:
        verbs.append(verb := cli.parse(arguments))
        if isinstance(verb, cli.Eval):
            (verb.run_dir / "eval").mkdir(parents=True)
            metrics = {"scales": {}, "mean": {"psnr": 35.5}, "run": {"device": "NVIDIA H200"}}
            (verb.run_dir / "eval" / "metrics.json").write_text(json.dumps(metrics))
        return {"wall_seconds": 70.0}

    monkeypatch.setattr(bench_fast_quality, "_run", run)
    part = fast_parts.PARTS["cuda"]["minute"]
    found = bench_fast_quality.quality(part, tmp_path / "lego", tmp_path / "runs", "cuda")
    convert, train, evaluate = verbs
    assert (convert.downscale, convert.levels) == (1, 4) and convert.data == str(tmp_path / "lego")
    assert (train.preset, train.device, train.max_minutes) == ("fast-gpu", "cuda", 1)
    assert train.config == preset("fast-gpu") and train.data == str(convert.out)
    assert (evaluate.device, evaluate.run_dir) == ("cuda", train.run_dir)
    assert (found["scene"], found["mean"], found["training"]) == (
        "lego",
        {"psnr": 35.5},
        {"wall_seconds": 70.0},
    )
    verbs.clear()
    aliased = fast_parts.PARTS["cpu"]["aliased"]
    bench_fast_quality.quality(aliased, tmp_path / "lego", tmp_path / "runs", "cpu")
    assert verbs[1].device == verbs[2].device == "cpu" and verbs[1].preset == "fast"
    assert verbs[1].config.model.attenuation == "none" and not verbs[1].config.model.scale_input
    with pytest.raises(SystemExit, match="exists; move it away"):
        bench_fast_quality.quality(aliased, tmp_path / "lego", tmp_path / "runs", "cpu")


def test_children_are_told_the_revision_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Child:
        pid = 1

        def __init__(self, command: list[str], env: dict[str, str], **options: Any) -> None:
            given.update(env, command=command)

    monkeypatch.setattr(bench_fast_quality, "revision", lambda: "abc")
    monkeypatch.setattr(subprocess, "Popen", Child)
    used = os.times()
    usage = type("Usage", (), {"ru_utime": used.user, "ru_stime": used.system, "ru_maxrss": 7})
    monkeypatch.setattr(os, "wait4", lambda pid, options: (pid, 0, usage))
    assert bench_fast_quality._run(["info"])["peak_bytes"] == 7 * 1024
    assert given["MIPNERF_FAST_REVISION"] == "abc"
    assert given["command"][1:] == ["-m", "mipnerf_fast.cli", "info"]


# --------------------------------------------------------------------------------------------------- the tables


def rows(table: str) -> dict[str, list[str]]:
    """Cells by the first one."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line
    ]
    return {line[0]: line[1:] for line in lines[2:]}


def result(mean: float, device: str = "NVIDIA H200", scene: str = "lego") -> dict[str, Any]:
    scores = {"psnr": mean, "ssim": 0.9}
    return {
        "scene": scene,
        "training": {
            "wall_seconds": 80.0,
            "cpu_seconds": 90.0,
            "peak_bytes": 3 * 10**9,
            "load_before": 1,
            "load_after": 1,
        },
        "scales": {str(2**k): scores for k in range(4)},
        "mean": scores,
        "run": {"device": device, "torch": "2.13.0", "revision": "abc", "steps": 70_000},
    }


def speed(seconds: float, device: str = "NVIDIA H200", scene: str = "lego") -> dict[str, Any]:
    rates = {"samples_per_second": 3e8, "rays_per_second": 4e7, "steps_per_second": 1200.0}
    return {
        "scene": scene,
        "training": rates,
        "view": {"run": "five", "views": 25, "width": 800, "height": 800, "median_seconds": seconds},
        "peak_allocated_bytes": 2 * 10**9,
        "peak_reserved_bytes": 3 * 10**9,
        "run": {"device": device, "torch": "2.13.0", "revision": "abc"},
    }


def put(folder: Path, **found: dict[str, Any]) -> None:
    for name, content in found.items():
        (folder / fast_parts.result_file(name, "cuda")).write_text(json.dumps(content))


def test_without_results_every_target_is_not_measured(tmp_path: Path) -> None:
    assert bench_fast_quality.main(["--only", "--out", str(tmp_path)]) == 0
    found = rows((tmp_path / "fast_targets_cpu.md").read_text())
    assert {cells[1] for cells in found.values()} == {"not measured"}
    assert {cells[2] for cells in found.values()} == {"-"}
    full = "four scales, 800 to 100 pixels"
    assert found[f"H200, {full}, 1 min: mean PSNR"][0] == "at least 35 dB"
    assert found[f"H200, {full}, 5 min: mean PSNR"][0] == "at least 36 dB"
    assert found["H200, 800 x 800 frame"][0] == "at most 5 ms"
    assert "200 x 200 view" in found and "whole training step, one thread" in found
    # A GPU's tables are made where one was measured, or is asked for.
    assert not (tmp_path / "fast_targets_cuda.md").exists()
    assert bench_fast_quality.main(["--only", "--out", str(tmp_path), "--device", "cuda"]) == 0
    assert set(rows((tmp_path / "fast_targets_cuda.md").read_text())) == {n for n in found if "H200" in n}
    assert (tmp_path / "fast_quality_cuda.md").read_text().count("not measured") == 2


def test_a_gpu_s_results_are_judged_in_both_tables(tmp_path: Path) -> None:
    put(tmp_path, minute=result(35.01), five=result(35.9), speed=speed(4.1e-3))
    for device in ("cpu", "cuda"):
        found = rows(fast_parts.targets_table(tmp_path, device))
        full = "H200, four scales, 800 to 100 pixels"
        assert found[f"{full}, 1 min: mean PSNR"][1:] == ["35.01 dB", "yes"]
        assert found[f"{full}, 5 min: mean PSNR"][1:] == ["35.90 dB", "**no**"]
        assert found["H200, 800 x 800 frame"][1:] == ["4.10 ms", "yes"]
        step = found["H200, whole training step as captured"]
        assert step[1] == "300.0 M samples/s, 40.00 M rays/s, 1200 steps/s"
        memory = found["H200, peak device memory of training and rendering"]
        assert memory[1] == "2.00 GB, 3.00 GB with what torch keeps"
    quality = fast_parts.quality_table(tmp_path, "cuda")
    assert "| 1 | 35.01 / 35.01 / 35.01 / 35.01 | 35.01 | 70,000 |" in quality
    put(tmp_path, speed=speed(5.1e-3))
    assert rows(fast_parts.targets_table(tmp_path, "cuda"))["H200, 800 x 800 frame"][2] == "**no**"


@pytest.mark.parametrize(("device", "scene"), [("NVIDIA H100 80GB HBM3", "lego"), ("NVIDIA H200", "demo")])
def test_what_the_targets_do_not_speak_of_is_not_judged(tmp_path: Path, device: str, scene: str) -> None:
    put(tmp_path, minute=result(40, device, scene), speed=speed(1e-3, device, scene))
    found = rows(fast_parts.targets_table(tmp_path, "cuda"))
    assert {cells[2] for cells in found.values()} == {"-"}
    gpu = device.removeprefix("NVIDIA ")
    title = "four scales, 800 to 100 pixels" if scene == "lego" else "scene 'demo', downscale 1, 4 levels"
    assert found[f"{gpu}, {title}, 1 min: mean PSNR"][1] == "40.00 dB"
    assert found["H200, four scales, 800 to 100 pixels, 5 min: mean PSNR"][1] == "not measured"


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    for name, table in (
        ("quality", fast_parts.quality_table),
        ("targets", fast_parts.targets_table),
    ):
        for device in fast_parts.PARTS:
            path = RESULTS / f"fast_{name}_{device}.md"
            if device == "cpu" or path.exists():
                assert path.read_text(encoding="utf-8") == table(RESULTS, device)
