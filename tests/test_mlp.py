"""MipMLP: every engine that runs here against float64, the choice between them, moves of weights, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from mlp_engines import (
    ENGINES,
    NO_VIEW_LAYER,
    SHAPES,
    Engine,
    by_engine,
    evaluate,
    exact,
    inputs,
    plain,
    relative_errors,
)

from mipnerf_fast import MipNerf, MipNerfConfig, ops, use_backend
from mipnerf_fast.config import MlpBackend, MlpDtype, TrainConfig, from_dict, to_dict
from mipnerf_fast.errors import InputError
from mipnerf_fast.ops import (
    MLP_BACKENDS,
    MLP_DTYPES,
    MipMLP,
    MlpShape,
    choose_mlp,
    mlp_backends,
    mlp_fused,
    mlp_fused_network,
)
from mipnerf_fast.ops.mlp_fused import why_not_fused
from mipnerf_fast.ops.mlp_fused_network import Kernels, Sizes
from mipnerf_fast.run_folder import check_same_config

CPU = torch.device("cpu")
SMALL = SHAPES["64 wide"]


def assert_close(engine: Engine, shape: MlpShape, rays: int, samples: int) -> None:
    """No tensor further from float64 than twice PyTorch in the same precision; with a floor of 8 ulps of float32.

    16-bit operands decide some ReLUs otherwise, and which ones is luck: a gradient alone may be off by two more of one
    sample in the narrowest layer, each a share of 1 / sqrt(samples x width) of its norm, and be as wrong as twice the
    worst of autocast's.
    """
    mlp = engine.build(shape)
    assert mlp.implementation.engine == engine.backend
    dtype = mlp.implementation.dtype
    features, viewdirs_enc = inputs(shape, rays, samples)
    want = exact(mlp, features, viewdirs_enc)
    errors = relative_errors(evaluate(mlp, features, viewdirs_enc), want)
    allowed = relative_errors(plain(mlp, features, viewdirs_enc, dtype), want)
    floor = 8 * torch.finfo(torch.float32).eps
    narrowest = (
        shape.net_width if shape.view_features is None else min(shape.net_width, shape.net_width_condition)
    )
    flips = 0.0 if dtype == torch.float32 else 2 / (rays * samples * narrowest) ** 0.5
    worst = max(value for name, value in allowed.items() if name not in ("rgb", "density"))
    for name, error in errors.items():
        alone = name not in ("rgb", "density", "all outputs", "all gradients")
        bound = floor + (min(2 * allowed[name] + flips, 2 * worst) if alone else 2 * allowed[name])
        assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"


@by_engine
@pytest.mark.parametrize("shape", list(SHAPES))
def test_outputs_and_gradients(engine: Engine, shape: str) -> None:
    assert_close(engine, SHAPES[shape], *((5, 64) if shape == "paper" else (24, 64)))


@by_engine
@pytest.mark.parametrize(("rays", "samples"), [(53, 19), (1030, 1), (1, 1000)])
def test_tails(engine: Engine, rays: int, samples: int) -> None:
    """About a thousand samples, so that flipped ReLUs average out, in numbers that no tile divides."""
    assert_close(engine, SMALL, rays, samples)


@by_engine
@pytest.mark.parametrize(("rays", "samples"), [(1, 1), (3, 7), (9, 16)])
def test_a_sample_does_not_depend_on_the_others(engine: Engine, rays: int, samples: int) -> None:
    """A few rays alone are as they are among many, but for the order of sums, within twice the error of the many."""
    mlp, (features, viewdirs_enc) = engine.build(SMALL), inputs(SMALL, 24, 16)
    assert viewdirs_enc is not None
    many, want = (f(mlp, features, viewdirs_enc) for f in (evaluate, exact))
    few = evaluate(mlp, features[:rays, :samples], viewdirs_enc[:rays])
    for name in ("rgb", "density"):
        bound = 2 * (many[name] - want[name]).abs().max()
        assert (few[name] - many[name][:rays, :samples]).abs().max() <= bound


@pytest.mark.parametrize("engine", [e for e in ENGINES if e.backend != "fused"], ids=str)
def test_without_a_view_layer(engine: Engine) -> None:
    assert_close(engine, NO_VIEW_LAYER, 24, 64)


@by_engine
@pytest.mark.parametrize("shape", ["64 wide", "two skips, no views"])
def test_no_rays(engine: Engine, shape: str) -> None:
    mlp = engine.build(SHAPES[shape])
    results = evaluate(mlp, *inputs(SHAPES[shape], 0, 8))
    assert results["rgb"].shape == (0, 8, 3) and results["density"].shape == (0, 8, 1)
    assert all((results[name] == 0).all() for name, _ in mlp.named_parameters())


@by_engine
def test_without_gradients_the_same_numbers(engine: Engine) -> None:
    mlp, (features, viewdirs_enc) = engine.build(SMALL), inputs(SMALL, 5, 70)
    arguments = features.to(engine.device), viewdirs_enc.to(engine.device)  # type: ignore[union-attr]
    with_graph = mlp(*arguments)
    assert with_graph[0].requires_grad
    with torch.no_grad():
        without = mlp(*arguments)
    assert not without[0].requires_grad
    for a, b in zip(with_graph, without, strict=True):
        assert torch.equal(a, b)


@by_engine
def test_one_output_alone(engine: Engine) -> None:
    """A loss on one output has the gradients of one that gives the other no weight."""
    mlp, (features, viewdirs_enc) = engine.build(SMALL), inputs(SMALL, 4, 16)
    arguments = features.to(engine.device), viewdirs_enc.to(engine.device)  # type: ignore[union-attr]
    parameters = list(mlp.parameters())
    for index in (0, 1):
        alone = torch.autograd.grad(mlp(*arguments)[index].sum(), parameters)
        outputs = mlp(*arguments)
        total = outputs[index].sum() + 0 * outputs[1 - index].sum()
        for a, b in zip(alone, torch.autograd.grad(total, parameters), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@by_engine
def test_frozen_layers_and_inputs_of_other_dtypes(engine: Engine) -> None:
    """Features in 16 bits are taken as they are; a layer without gradient gets none, the others theirs."""
    mlp, (features, viewdirs_enc) = engine.build(SMALL), inputs(SMALL, 4, 16)
    assert viewdirs_enc is not None
    rounded = features.bfloat16()
    want = evaluate(mlp, rounded.float(), viewdirs_enc, with_inputs=False)
    mlp.linears[2].requires_grad_(False)
    rgb, density = mlp(rounded.to(engine.device), viewdirs_enc.to(engine.device))
    assert rgb.dtype == density.dtype == torch.float32
    torch.testing.assert_close(rgb.double().cpu(), want["rgb"], rtol=0, atol=0)
    (rgb.sum() + density.sum()).backward()
    assert mlp.linears[2].weight.grad is None
    assert all(p.grad is not None for name, p in mlp.named_parameters() if not name.startswith("linears.2."))


@pytest.mark.parametrize(
    "engine",
    [e for e in ENGINES if e.compute_dtype == ("fp32" if e.backend == "folded" else "bf16")],
    ids=str,
)
def test_fullgraph(engine: Engine) -> None:
    """Compiled, with static and with dynamic shapes: the same numbers, forward and every gradient."""
    mlp = engine.build(SMALL._replace(net_depth=3))
    torch.compiler.reset()

    def step(features: torch.Tensor, viewdirs_enc: torch.Tensor) -> torch.Tensor:
        rgb, density = mlp(features, viewdirs_enc)
        return rgb.sin().sum() + density.sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rays in (3, 5, 6):
        given = [x.to(engine.device).requires_grad_() for x in inputs(SMALL, rays, 11) if x is not None]
        leaves = [*given, *mlp.parameters()]
        want = torch.autograd.grad(step(*given), leaves)
        got = torch.autograd.grad(compiled(*given), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*given), step(*given))


def test_inductor() -> None:
    mlp, given = Engine("folded", "fp32", "cpu").build(SMALL._replace(net_depth=3)), inputs(SMALL, 4, 9)
    torch.compiler.reset()
    compiled = torch.compile(mlp, fullgraph=True)
    for a, b in zip(compiled(*given), mlp(*given), strict=True):
        torch.testing.assert_close(a, b)
    got = torch.autograd.grad(compiled(*given)[0].sum(), list(mlp.parameters()))
    want = torch.autograd.grad(mlp(*given)[0].sum(), list(mlp.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@by_engine
def test_a_second_derivative_raises(engine: Engine) -> None:
    mlp, (features, viewdirs_enc) = engine.build(SMALL), inputs(SMALL, 2, 3)
    features = features.to(engine.device).requires_grad_()
    rgb, _ = mlp(features, viewdirs_enc.to(engine.device))  # type: ignore[union-attr]
    (grad,) = torch.autograd.grad(rgb.sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match=r"the second derivative is not implemented|differentiate twice"):
        grad.square().sum().backward()


# ------------------------------------------------------------------------------------------ weights and choices


def test_weights_move_between_backends() -> None:
    states = {
        backend: MipMLP(*SMALL, backend=backend).state_dict()
        for backend in MLP_BACKENDS
        if backend not in ("tcnn",)
    }
    shapes = {backend: {k: v.shape for k, v in state.items()} for backend, state in states.items()}
    assert all(shape == shapes["reference"] for shape in shapes.values())
    other = MipMLP(*SMALL, backend="reference")
    other.load_state_dict(states["folded"])
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), states["folded"].values(), strict=True)
    )


def test_auto_on_the_cpu() -> None:
    mlp = MipMLP(*SMALL)
    assert mlp.implementation[:2] == ("folded", torch.float32) and mlp.feature_dtype is None
    with use_backend("native"):
        assert mlp.implementation.engine == "folded"
    with use_backend("reference"):
        assert mlp.implementation == ("reference", torch.float32, "the backend is set to reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp.implementation.engine == "reference" and "autocast" in mlp.implementation.why
    assert mlp.double().implementation.engine == "reference" and "float64" in mlp.implementation.why
    assert mlp.bfloat16().implementation.engine == "reference"
    assert "must be float32, not bfloat16" in mlp.implementation.why


def test_reference_goes_before_every_backend() -> None:
    given = inputs(SMALL, 3, 5)
    for backend in ("folded", "emulated", "fused", "cublaslt"):
        mlp = MipMLP(*SMALL, backend=backend)
        with use_backend("reference"):
            got = mlp(*given)
        want = MipMLP(*SMALL, backend="reference")
        want.load_state_dict(mlp.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(got, want(*given), strict=True))


def test_bf16_on_the_cpu_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(mlp_backends, "CPU_BF16", has)
        choice = choose_mlp(SMALL, CPU, torch.float32, "auto", "bf16")
        assert choice.engine == "folded" and choice.dtype == wanted
    assert "not in bfloat16: this processor has no bfloat16 products" in choice.why
    with pytest.raises(RuntimeError, match="set to folded, but this processor has no bfloat16 products"):
        choose_mlp(SMALL, CPU, torch.float32, "folded", "bf16")
    assert choose_mlp(SMALL, CPU, torch.float32, "auto", "fp16").dtype == torch.float32


def test_on_a_gpu_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided from device types alone, so that it is tested without a GPU."""
    gpu, master = torch.device("cuda"), torch.float32
    monkeypatch.setattr(mlp_backends, "_HAS_CUBLASLT", True)
    monkeypatch.setitem(mlp_backends._WHY_NOT, "fused", lambda *_: "it is not there")
    choice = choose_mlp(SMALL, gpu, master)
    assert choice == ("cublaslt", torch.bfloat16, "not fused: it is not there; bfloat16 operands")
    assert choose_mlp(SMALL, gpu, master, "auto", "fp16").dtype == torch.float16
    assert choose_mlp(SMALL, gpu, master, "auto", "fp32")[:2] == ("folded", torch.float32)
    odd = SMALL._replace(in_features=63)
    choice = choose_mlp(odd, gpu, master)
    assert choice.engine == "folded" and "in_features must be a multiple of 8, not 63" in choice.why
    with pytest.raises(RuntimeError, match="set to cublaslt, but in_features must be a multiple of 8"):
        choose_mlp(odd, gpu, master, "cublaslt")
    with use_backend("native"), pytest.raises(RuntimeError, match="set to native, but not fused"):
        choose_mlp(odd, gpu, master)
    monkeypatch.setattr(mlp_backends, "_HAS_CUBLASLT", False)
    with pytest.raises(RuntimeError, match="set to cublaslt, but"):
        choose_mlp(SMALL, gpu, master, "cublaslt")


def test_unknown_names_are_refused() -> None:
    for backend, dtype, message in (
        ("tcnn", "auto", "mlp: backend must be one of .*; tcnn is MipMLP's own, got 'tcnn'"),
        ("best", "auto", "mlp: backend must be one of auto, reference, .*, got 'best'"),
        ("auto", "int8", "mlp: compute_dtype must be one of auto, bf16, fp16, fp32, got 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_mlp(SMALL, CPU, torch.float32, backend, dtype)


def test_what_the_fused_kernels_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each limit by its name, with what was found; and what is within all of them."""
    half, single, gpu = torch.bfloat16, torch.float32, torch.device("cuda")
    sizes = Sizes(256, 8, 4, 128, 1)
    monkeypatch.setattr(mlp_fused, "HAS_KERNELS", False)
    monkeypatch.setattr(mlp_fused, "WHY_NO_KERNELS", "there is no library")
    assert why_not_fused(96, sizes, gpu, single, half) == "there is no library"
    monkeypatch.setattr(mlp_fused, "HAS_KERNELS", True)
    found = SimpleNamespace(major=7, minor=5, name="an old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    why = why_not_fused(96, sizes, gpu, single, half)
    assert why == "it needs compute capability 8.0, and an old GPU has 7.5"
    found.major, found.minor = 8, 0
    for operands in (torch.bfloat16, torch.float16):
        assert why_not_fused(128, Sizes(64, 1, 1, 64, 8), gpu, single, operands) == ""
    for features, changed, master, operands, why in (
        (96, sizes, single, torch.float32, "its operands are bfloat16 or float16, not float32"),
        (96, sizes, torch.float64, half, "its parameters must be float32, not float64"),
        (95, sizes, single, half, "in_features must be even and at most 128, not 95"),
        (130, sizes, single, half, "in_features must be even and at most 128, not 130"),
        (96, sizes._replace(width=32), single, half, "net_width must be 64, 128 or 256, not 32"),
        (96, sizes._replace(depth=9), single, half, "net_depth must be 1 to 8, not 9"),
        (96, sizes._replace(view_depth=9), single, half, "net_depth_condition must be at most 8, not 9"),
        (
            96,
            sizes._replace(view_width=24),
            single,
            half,
            "net_width_condition must be a multiple of 16, .* 24",
        ),
        (
            96,
            sizes._replace(view_width=512),
            single,
            half,
            "net_width_condition .* at most net_width, not 512",
        ),
    ):
        assert re.fullmatch(why, why_not_fused(features, changed, gpu, master, operands))


def test_an_old_gpu_has_no_cublaslt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_backends, "_HAS_CUBLASLT", True)
    monkeypatch.setattr(mlp_backends, "_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    with pytest.raises(
        RuntimeError, match=r"cublaslt, but it needs compute capability 8\.0, and an old GPU is"
    ):
        choose_mlp(SMALL, torch.device("cuda"), torch.float32, "cublaslt")


@pytest.mark.parametrize(
    ("architectures", "has"), [(["8.0", "9.0a"], True), (["9.0a+PTX"], True), (["9.0"], False)]
)
def test_kernels_for_hopper(architectures: list[str], has: bool) -> None:
    assert mlp_fused_network.has_hopper(architectures) is has


def test_on_ampere_and_ada_cublaslt_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_backends, "_HAS_CUBLASLT", True)
    monkeypatch.setitem(mlp_backends._WHY_NOT, "fused", lambda *_: "")
    for capability, engine in (
        ((8, 0), "cublaslt"),
        ((8, 9), "cublaslt"),
        ((9, 0), "fused"),
        ((12, 0), "fused"),
    ):
        monkeypatch.setattr(mlp_backends, "_capability", lambda _, found=capability: found)
        assert choose_mlp(SMALL, torch.device("cuda"), torch.float32).engine == engine


def test_info_names_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says why that one, why no other, for which network, and what of it could be faster."""
    for has, hint in (
        (True, " (--mlp-dtype bf16 may be faster on this processor, from thousands of samples on)"),
        (False, ""),
    ):
        monkeypatch.setattr(mlp_backends, "CPU_BF16", has)
        entry = next(e for e in ops.implementations("cpu") if e.operation == "mlp")
        assert entry.used == "native"
        assert entry.why == (
            f"folded, not fused, not cublaslt: they run on a GPU; float32 operands{hint}; "
            "of the paper's 8 x 256 network"
        )
    with use_backend("reference"):
        entry = next(e for e in ops.implementations("cpu") if e.operation == "mlp")
    assert entry == ("mlp", "reference", "the backend is set to reference")


def test_info_has_a_line_of_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its state and the reason, on a CPU and, decided from the device's type alone, on a GPU."""

    def lines(device: str) -> dict[str, tuple[str, str]]:
        found = {engine: (state, why) for engine, state, why in ops.mlp_engines(device)}
        assert list(found) == list(MLP_BACKENDS[1:])
        return found

    on_gpu = "it runs on a GPU, and the parameters are on cpu"
    cpu = lines("cpu")
    assert {name: state for name, (state, _) in cpu.items()} == {
        "reference": "can serve",
        "folded": "used",
        "cublaslt": "cannot serve",
        "fused": "cannot serve",
        "tcnn": "cannot serve",
        "emulated": "can serve",
    }
    assert cpu["cublaslt"][1] == cpu["fused"][1] == on_gpu
    assert cpu["emulated"][1] == "cublaslt's arithmetic on the CPU, slow, for checks; folded goes first"
    assert (
        "another architecture" in cpu["tcnn"][1] and "got 256" in cpu["tcnn"][1] and on_gpu in cpu["tcnn"][1]
    )
    assert cpu["folded"][1].startswith("not fused, not cublaslt: ")
    with use_backend("reference"):
        forced = lines("cpu")
    assert forced["reference"] == ("used", "the backend is set to reference")
    assert forced["folded"] == ("can serve", "torch's products in float32; reference goes first")

    monkeypatch.setattr(mlp_backends, "_HAS_CUBLASLT", True)
    monkeypatch.setattr(mlp_backends, "_capability", lambda _: (8, 6))
    monkeypatch.setitem(mlp_backends._WHY_NOT, "fused", lambda *_: "it is not there")
    gpu = lines("cuda")
    assert gpu["cublaslt"] == ("used", "bfloat16 operands")
    assert gpu["fused"] == ("cannot serve", "it is not there")
    assert gpu["folded"][0] == "can serve" and gpu["folded"][1].endswith("cublaslt goes first")
    assert gpu["emulated"] == (
        "cannot serve",
        "it emulates a GPU on the CPU, and the parameters are on cuda",
    )
    assert "it runs on a GPU" not in gpu["tcnn"][1]
    for name in ("cublaslt", "fused"):
        monkeypatch.setitem(mlp_backends._WHY_NOT, name, lambda *_, name=name: f"no {name} today")
    with use_backend("native"):
        none = lines("cuda")
    assert "used" not in [state for state, _ in none.values()]
    assert none["folded"][1].endswith(
        "set to native, but not cublaslt: no cublaslt today; not fused: no fused today"
    )


# --------------------------------------------------------------------------------------- in the same order or not


class Recording:
    """Kernels that compute nothing and note whether they were asked for sums in a fixed order."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def kernels(self) -> Kernels:
        def nothing(*_: object) -> None:
            raise AssertionError

        def pack(flat: torch.Tensor, *_: object) -> torch.Tensor:
            return flat.clone()

        def forward(features: torch.Tensor, *_: object) -> tuple[torch.Tensor, ...]:
            kept = torch.empty(0)
            return torch.zeros(len(features), 3), torch.zeros(len(features)), kept, kept.clone()

        def backward(
            grad_rgb: torch.Tensor | None,
            grad_density: torch.Tensor | None,
            features: torch.Tensor,
            packed: torch.Tensor,
            *rest: object,
        ) -> tuple[torch.Tensor, ...]:
            samples_per_ray, view_width, (deterministic, to_features) = rest[2], rest[6], rest[-2:]
            assert isinstance(samples_per_ray, int) and isinstance(view_width, int)
            assert isinstance(deterministic, bool) and to_features is False
            self.asked.append(deterministic)
            rays = len(features) // samples_per_ray
            return torch.zeros_like(packed), torch.zeros(rays, view_width), torch.zeros(0, features.shape[1])

        return Kernels(pack, forward, backward, nothing, nothing)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_order_of_sums_is_an_option(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed by default, and wherever torch's algorithms are to be deterministic when the backward pass runs."""
    recording = Recording()
    monkeypatch.setattr(mlp_fused_network, "operators", recording.kernels)
    choice = ops.MlpChoice("fused", torch.bfloat16, "for a test")
    monkeypatch.setattr(MipMLP, "implementation", property(lambda _: choice))
    given = inputs(SMALL, 2, 3)

    def asked(mlp: MipMLP) -> bool:
        recording.asked.clear()
        rgb, density = (torch.compile(mlp, backend="aot_eager") if compiled else mlp)(*given)
        (rgb.sum() + density.sum()).backward()
        return recording.asked[-1]  # compiled, those before it are of tracing

    torch.compiler.reset()
    assert asked(MipMLP(*SMALL)) is True
    assert asked(MipMLP(*SMALL, deterministic=False)) is False
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert asked(MipMLP(*SMALL, deterministic=False)) is True
    finally:
        torch.use_deterministic_algorithms(before)


def test_the_order_of_sums_is_configured_and_may_change_in_a_resumed_run() -> None:
    config = MipNerfConfig(num_samples=4, net_depth=2, net_width=16)
    assert MipNerf(config).mlp.deterministic is True
    config = dataclasses.replace(config, mlp_deterministic=False)
    assert MipNerf(config).mlp.deterministic is False
    check_same_config(TrainConfig(), TrainConfig(model=MipNerfConfig(mlp_deterministic=False)), "there")


def test_the_model_passes_its_configuration_on() -> None:
    config = MipNerfConfig(num_samples=4, net_depth=2, net_width=16, mlp_backend="emulated", mlp_dtype="fp16")
    mlp = MipNerf(config).mlp
    assert mlp.implementation[:2] == ("emulated", torch.float16) and mlp.feature_dtype == torch.float16
    assert MipNerf(MipNerfConfig(net_depth=2, net_width=16)).mlp.backend == "auto"


def test_configurations_and_old_files() -> None:
    assert get_args(MlpBackend) == MLP_BACKENDS and get_args(MlpDtype) == tuple(MLP_DTYPES)
    with pytest.raises(InputError, match=r"mlp_backend: expected one of auto, reference, .*, got 'cutlass'"):
        MipNerfConfig(mlp_backend="cutlass")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="mlp_dtype: expected one of auto, bf16, fp16, fp32, got 'fp8'"):
        MipNerfConfig(mlp_dtype="fp8")  # type: ignore[arg-type]
    values = json.loads(json.dumps(to_dict(TrainConfig())))
    for name in ("mlp_backend", "mlp_dtype", "mlp_deterministic"):
        del values["model"][name]
    assert from_dict(values) == TrainConfig()


def test_a_run_resumes_on_another_backend_but_not_as_tcnn() -> None:
    def run(backend: str) -> TrainConfig:
        return TrainConfig(model=MipNerfConfig(mlp_backend=backend))  # type: ignore[arg-type]

    check_same_config(run("folded"), run("cublaslt"), "there")
    with pytest.raises(InputError, match=r"model\.mlp_backend: 'auto' in there, 'tcnn' now"):
        check_same_config(run("auto"), run("tcnn"), "there")


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cutlass"}, "mlp: backend must be one of auto, reference, .*, got 'cutlass'"),
        ({"compute_dtype": "tf32"}, "mlp: compute_dtype must be one of auto, bf16, fp16, fp32, got 'tf32'"),
    ],
)
def test_unknown_names(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MipMLP(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cublaslt", "fused"])
def test_a_gpu_backend_on_the_cpu_says_so(backend: str) -> None:
    mlp = MipMLP(*SMALL, backend=backend)
    message = f"mlp: the backend is set to {backend}, but it runs on a GPU, and the parameters are on cpu"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        mlp(*inputs(SMALL, 2, 3))


@pytest.mark.parametrize("backend", ["reference", "folded"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, v: (f[0], v), r"features must be of shape \[B, N, 48\], got \[3, 48\]"),
        (lambda f, v: (f[..., 1:], v), r"features must be of shape \[B, N, 48\], got \[2, 3, 47\]"),
        (
            lambda f, v: (f.long(), v),
            "features must be float32, float64, bfloat16 or float16, got torch.int64",
        ),
        (lambda f, v: (f.to("meta"), v), "features must be on cpu as the parameters, got meta"),
        (lambda f, v: (f, None), r"viewdirs_enc must be of shape \[2, 9\] \(\[B, V\]\), got None"),
        (lambda f, v: (f, v[:1]), r"viewdirs_enc must be of shape \[2, 9\] \(\[B, V\]\), got \[1, 9\]"),
        (lambda f, v: (f, v.long()), "viewdirs_enc must be float32"),
        (lambda f, v: (f, v.to("meta")), "viewdirs_enc must be on cpu"),
    ],
)
def test_bad_arguments(backend: str, change: object, message: str) -> None:
    mlp = MipMLP(*SMALL, backend=backend)
    with pytest.raises(ValueError, match=f"mlp: {message}"):
        mlp(*change(*inputs(SMALL, 2, 3)))  # type: ignore[operator]


def test_a_network_without_views_wants_none() -> None:
    shape = MlpShape(24, None, 2, 16, 1, 16, 4)
    mlp = MipMLP(*shape)
    features, _ = inputs(shape, 2, 3)
    with pytest.raises(ValueError, match="viewdirs_enc must be None for a network without views"):
        mlp(features, torch.rand(2, 9))
    assert mlp(features, None)[0].shape == (2, 3, 3)
    assert copy.deepcopy(mlp)(features, None)[0].shape == (2, 3, 3)
