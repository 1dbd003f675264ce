"""The benchmarks of operations: their inputs lie where they are asked to, their results are kept case by case."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_march, bench_ray_batch, fast_scene, harness
from benchmarks.harness import Case, Inputs, Outputs
from mipnerf_fast import use_backend

META = torch.device("meta")
SCRIPTS = [
    path.stem
    for path in sorted(Path(harness.__file__).parent.glob("bench_*.py"))
    if "harness import" in (text := path.read_text(encoding="utf-8")) and "def cases(" in text
]


def reached(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that a callable can reach: in its closure, its defaults, the objects it is bound to."""
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: list[Any] = []
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        inner = [*value.parameters(), *value.buffers()]
    elif isinstance(value, types.FunctionType):
        inner = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        for cell in value.__closure__ or ():
            try:
                inner.append(cell.cell_contents)
            except ValueError:
                continue  # not yet assigned
    elif isinstance(value, types.MethodType):
        inner = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif type(value).__module__.startswith(("mipnerf_fast", "benchmarks")) and hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    for part in inner:
        yield from reached(part, seen)


@pytest.mark.parametrize("name", SCRIPTS)
def test_everything_that_is_timed_lies_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device "meta", which holds no numbers but knows where a tensor is."""
    module = importlib.import_module(f"benchmarks.{name}")
    # How carefully bench_march chooses its rays is another test's.
    monkeypatch.setattr(module, "_NUDGES", 0, raising=False)
    cases = module.cases(META)
    assert cases
    for case in cases:
        inputs = case.make_inputs(0, META)
        assert {n: x.device.type for n, x in inputs.items()} == dict.fromkeys(inputs, "meta")
        timed = [case.reference, case.truth, *case.references.values(), *case.variants().values()]
        found = list(reached(timed, set()))
        assert all(tensor.device.type == "meta" for tensor in found), [tuple(t.shape) for t in found]


def test_a_tensor_that_stays_behind_is_found() -> None:
    left, moved = torch.zeros(3), torch.zeros(3, device=META)
    network = torch.nn.Linear(2, 2)

    def run(inputs: Inputs) -> Outputs:
        return {"sum": inputs["x"] + left + moved}

    assert {tensor.device.type for tensor in reached([functools.partial(run, {})], set())} == {"cpu", "meta"}
    assert len(list(reached(lambda: network, set()))) == 2
    assert len(list(reached(network.forward, set()))) == 2


# the series of cases


def case(name: str, fails: bool = False) -> Case:
    def run(inputs: Inputs) -> Outputs:
        return {"twice": 2 * inputs["x"]}

    def make_inputs(seed: int, device: torch.device) -> Inputs:
        if fails:
            raise KeyboardInterrupt
        return {"x": torch.full((8,), float(seed), device=device)}

    return Case(
        name,
        make_inputs,
        lambda: {"eager": run, "native": run},
        run,
        run,
        1e-6,
        "nothing",
        64,
        8,
    )


def test_what_was_measured_is_there_when_the_rest_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quiet(harness.Control):
        def moved(self, seconds: float) -> bool:
            return False

    monkeypatch.setattr(harness, "Control", Quiet)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 1e10)
    command = ["bench", "--device", "cpu", "--threads", "1", "--runs", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--allocators", harness.AS_IT_COMES])
    with pytest.raises(KeyboardInterrupt):
        harness.main("doubling", lambda device: [case("a"), case("b", fails=True), case("c")], "")
    report = json.loads((tmp_path / "doubling_cpu.json").read_text())
    assert {row["case"] for row in report["results"]} == {"a"}
    assert all(row["median"] for row in report["results"])
    assert report["to_come"] == ["b", "c"]
    text = (tmp_path / "doubling_cpu.md").read_text()
    assert "**Not complete: it ended before b; c.**" in text and "| a | native |" in text
    harness.main("doubling", lambda device: [case("a"), case("c")], "")
    report = json.loads((tmp_path / "doubling_cpu.json").read_text())
    assert report["to_come"] == [] and {row["case"] for row in report["results"]} == {"a", "c"}
    text = (tmp_path / "doubling_cpu.md").read_text()
    assert "Not complete" not in text
    assert text == harness.markdown("doubling", report)
    report["environment"] |= {"revision": "abc", "library": "abc"}
    assert "Warning" not in harness.markdown("doubling", report)
    report["environment"]["library"] = "old"
    assert "**Warning: the native library is of revision old" in harness.markdown("doubling", report)


def test_outputs_of_another_shape_are_an_error_and_no_crash() -> None:
    want = {"t0": torch.zeros(4, dtype=torch.float64)}
    assert harness.largest_error({"t0": torch.zeros(4)}, want) == 0
    assert not harness.largest_error({"t0": torch.zeros(5)}, want) <= 1


# single operations


def test_rays_at_the_edge_of_a_sample_are_not_marched() -> None:
    """A count that jumps where a ray is: the same in float32 and in float64, but not a little beside it."""
    drawn = fast_scene.rays(0, 112)
    edge = drawn["phase"][5].double()

    def count(inputs: Inputs) -> Tensor:
        return (inputs["phase"][:, 0].double() >= edge).long()

    kept = bench_march.steady_rays(0, 100, count)
    assert set(kept) == set(bench_march.NAMES)
    others = [k for k in range(112) if k != 5][:100]
    for name, value in kept.items():
        assert torch.equal(value, drawn[name][others])
    with pytest.raises(RuntimeError, match=r"rays are steady, not 100"):
        bench_march.steady_rays(0, 100, lambda inputs: torch.rand(112))


def test_every_variant_of_ray_batch_is_the_batch() -> None:
    cpu = torch.device("cpu")
    small = bench_ray_batch.case(64, cpu)
    inputs = small.make_inputs(0, cpu)
    truth, variants = small.truth(inputs), small.variants()
    assert set(variants) == {"eager", "compile", "randint", "native"}
    assert set(truth) == {*bench_ray_batch.Rays._fields, "target"}
    allowed = 2 * harness.largest_error(small.reference(inputs), truth) + small.floor
    for name in ("eager", "native"):
        assert harness.largest_error(variants[name](inputs), truth) <= allowed
    # Other pixels of the same images: the same shapes, other numbers, and it says so.
    other = variants["randint"](inputs)
    assert all(other[name].shape == value.shape for name, value in truth.items())
    assert harness.largest_error(other, truth) > allowed
    assert set(small.unchecked) == {"randint"}
    # Another step is another batch.
    again = small.reference(small.make_inputs(1, cpu))
    assert harness.largest_error(again, truth) > allowed
    # What is compiled is one graph of the same numbers.
    batches = bench_ray_batch.RayBatches(bench_ray_batch.images("cpu"), cpu)

    def drawn(step: Tensor) -> Any:
        return batches.gather(*batches.choose(bench_ray_batch.SEED, step, 64))

    with use_backend("reference"):
        rays, target = torch.compile(drawn, fullgraph=True, backend="aot_eager")(inputs["step"])
    assert harness.largest_error(rays._asdict() | {"target": target}, truth) <= allowed
