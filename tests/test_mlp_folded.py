"""The folded network and the products it is written over: exactness, count of products, memory, masks, operators."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import cublaslt_on_cpu
import pytest
import torch
from mlp_engines import (
    NO_VIEW_LAYER,
    SHAPES,
    Engine,
    evaluate,
    exact,
    inputs,
    mip_mlp,
    plain,
    relative_errors,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.living_storages import PeakMemory
from mipnerf_fast.ops import MipMLP, MlpShape, gemm, mlp, mlp_folded_backward, mlp_folded_network
from mipnerf_fast.ops.gemm import CublasLt, CublasLtTwin, TorchGemm
from mipnerf_fast.ops.mlp_autograd import Architecture
from mipnerf_fast.ops.mlp_folded import CUBLASLT, TORCH, TWIN, folded_mlp
from mipnerf_fast.ops.mlp_folded_network import Network
from mipnerf_fast.ops.mlp_folded_passes import forward_pass

DOUBLE = torch.float64


def run_folded(
    mlp: MipMLP, features: Tensor, viewdirs_enc: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    parameters = [p for linear in mlp.linears for p in (linear.weight, linear.bias)]
    architecture = Architecture(mlp.net_depth, mlp.net_depth_condition, mlp.skip_layer)
    return folded_mlp(features, viewdirs_enc, parameters, architecture, TORCH, dtype)  # type: ignore[arg-type]


@pytest.fixture
def by_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass in torch's products, as without the library."""
    monkeypatch.setattr(mlp_folded_network, "_HAS_TILES", False)


@pytest.fixture
def use_gemm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts other products, or other sizes of chunks, under the folded network."""
    monkeypatch.setattr(mlp_folded_network, "_gemms", {})

    def use(products: int, engine: Any) -> Any:
        mlp_folded_network._gemms[products, engine.dtype, torch.device("cpu")] = engine
        return engine

    return use


# Epilogues that cuBLASLt has no algorithm for, a bit for each: none of them, all but the product alone, all.
REFUSED = {"cublaslt": 0, "cublaslt's product": 0xFE, "no cublaslt": 0xFF}


@pytest.fixture
def use_cublaslt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts the operator over cuBLASLt, its C++ as it is, on a cuBLASLt of the CPU that refuses some epilogues."""
    loaded = cublaslt_on_cpu.load()

    def use(kind: str) -> None:
        monkeypatch.setattr(gemm, "_cublaslt", loaded.operator)
        # Small, since it is overwritten; and of another size for each kind, since the operator remembers what it was
        # told about a workspace.
        monkeypatch.setattr(gemm, "_WORKSPACE_BYTES", 1024 + 16 * list(REFUSED).index(kind))
        loaded.refuse(REFUSED[kind])

    yield use
    loaded.refuse(0)
    assert loaded.alive() == 0


@pytest.fixture
def make_gemm(use_cublaslt: Callable[[str], None]) -> Callable[[str], Any]:
    """Products by their name and the operands' dtype."""

    def make(kind: str) -> Any:
        name, dtype_name = kind.split("-")
        dtype = getattr(torch, dtype_name)
        if name in ("torch", "twin"):
            return TorchGemm(dtype) if name == "torch" else CublasLtTwin(dtype)
        use_cublaslt(name)
        return CublasLt(dtype, torch.device("cpu"))

    return make


GEMMS = ["torch-float64", "torch-bfloat16", "twin-bfloat16", "twin-float16"]
GEMMS += [f"{name}-{dtype}" for name in REFUSED for dtype in ("bfloat16", "float16")]


@pytest.mark.parametrize("shape", [*SHAPES.values(), NO_VIEW_LAYER], ids=[*SHAPES, "no view layer"])
@pytest.mark.parametrize("chunk_rows", [1, 40, 1 << 20])
def test_the_algebra_is_exact(shape: MlpShape, chunk_rows: int, use_gemm: Any) -> None:
    """In float64 it is the reference to a few hundred roundings, outputs and every gradient, in chunks of any size."""
    use_gemm(TORCH, TorchGemm(DOUBLE)).chunk_rows = chunk_rows
    mlp = Engine("reference", "auto", "cpu").build(shape).double()
    features, viewdirs_enc = inputs(shape, 5, 9)
    given = [x for x in (features, viewdirs_enc) if x is not None]
    leaves = [x.double().requires_grad_() for x in given]
    arguments = leaves if viewdirs_enc is not None else [*leaves, None]
    want, got = mip_mlp(mlp, *arguments), run_folded(mlp, *arguments, DOUBLE)
    with torch.no_grad():
        for a, b in zip(run_folded(mlp, *arguments, DOUBLE), want, strict=True):
            assert (a - b).norm() <= 1e-13 * b.norm()
    cotangents = [torch.randn_like(x) for x in want]
    leaves += list(mlp.parameters())
    wanted = torch.autograd.grad(want, leaves, cotangents)
    found = torch.autograd.grad(got, leaves, cotangents)
    for a, b in zip((*got, *found), (*want, *wanted), strict=True):
        assert (a - b).norm() <= 1e-13 * b.norm()


class Counting(TorchGemm):
    """Counts multiply-adds by kind."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.counts = {"forward": 0, "grad_input": 0, "grad_weight": 0}

    def forward(self, x: Tensor, weight: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
        self.counts["forward"] += x.shape[0] * weight.numel()
        return super().forward(x, weight, out, **options)

    def grad_input(self, delta: Tensor, weight: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
        self.counts["grad_input"] += delta.shape[0] * weight.numel()
        return super().grad_input(delta, weight, out, **options)

    def grad_weight(self, delta: Tensor, x: Tensor, total: Tensor | None = None) -> Tensor:
        self.counts["grad_weight"] += delta.numel() * x.shape[1]
        return super().grad_weight(delta, x, total)


@pytest.mark.usefixtures("by_layers")
def test_products_of_the_papers_network(use_gemm: Any) -> None:
    """541,312 and 492,160 multiply-adds a sample forward and down, as counted by hand (performance 1.2); the first
    layer's 96 x 256 are done again; a gradient to the features costs its 2 x 96 x 256 only where they ask for one."""
    mlp, (features, viewdirs_enc) = MipMLP(), inputs(MlpShape(), 2, 8)
    samples = features.shape[0] * features.shape[1]
    for asked, down in ((False, 492_160), (True, 492_160 + 2 * 96 * 256)):
        counting = use_gemm(TORCH, Counting(torch.float32))
        rgb, density = run_folded(mlp, features.requires_grad_(asked), viewdirs_enc, torch.float32)
        (rgb.sum() + density.sum()).backward()
        assert counting.counts == {
            "forward": (541_312 + 96 * 256) * samples,
            "grad_input": down * samples,
            "grad_weight": 541_312 * samples,
        }


PAPER, PRESET = MlpShape(), MlpShape(72, 27, 3, 64, 1, 64, 4)
NO_VIEWS = PRESET._replace(view_features=None)


def peak(mlp: MipMLP, features: Tensor, viewdirs_enc: Tensor | None, training: bool) -> int:
    with PeakMemory() as memory, torch.set_grad_enabled(training):
        rgb, density = mlp(features, viewdirs_enc)
        if training:
            (rgb.sum() + density.sum()).backward()
        del rgb, density
    return memory.peak


@pytest.mark.parametrize("rays", [4, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("shape", [PAPER, PRESET], ids=["8 x 256", "3 x 64"])
@pytest.mark.parametrize(("training", "share"), [(False, 0.5), (True, 0.75)])
def test_memory(training: bool, share: float, shape: MlpShape, rays: int) -> None:
    """Of the reference's peak, from 256 samples on: half for inference, three quarters for training, where the
    activations are what counts, and for few samples the gradients."""
    features, viewdirs_enc = inputs(shape, rays, 64)
    peaks = {
        backend: peak(Engine(backend, "auto", "cpu").build(shape), features, viewdirs_enc, training)
        for backend in ("reference", "folded")
    }
    # The reference cannot do with less than a layer's input and output.
    assert peaks["reference"] >= 4 * rays * 64 * 2 * shape.net_width
    assert peaks["folded"] <= share * peaks["reference"], peaks


def test_a_graph_that_is_kept_goes_back_again() -> None:
    """What the first way back would have freed is there for the second; without, autograd says that it is gone."""
    mlp, given = Engine("folded", "fp32", "cpu").build(PRESET), inputs(PRESET, 2, 8)
    parameters = list(mlp.parameters())
    rgb, density = mlp(*given)
    loss = rgb.square().sum() + density.square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant: bool) -> None:
    """Done again in the backward pass it has the same gradients."""
    mlp, (features, viewdirs_enc) = Engine("folded", "fp32", "cpu").build(PRESET), inputs(PRESET, 2, 8)
    leaves = [features.requires_grad_(), *mlp.parameters()]

    def gradients(rgb: Tensor, density: Tensor) -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        (rgb.square().sum() + density.square().sum()).backward()
        return tuple(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)

    want = gradients(*mlp(features, viewdirs_enc))
    got = gradients(*checkpoint(mlp, features, viewdirs_enc, use_reentrant=use_reentrant))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ tile by tile


def test_few_samples() -> None:
    """The same numbers with and without a graph, compiled and under autocast; no further from float64 than twice the
    reference."""
    shape = SHAPES["heads read the skip"]
    mlp, given = Engine("folded", "fp32", "cpu").build(shape), inputs(shape, 4, 16)
    outputs = mlp(*given)
    assert outputs[0].requires_grad
    torch.compiler.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b, c in zip(outputs, mlp(*given), compiled(*given), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
    want, bound = exact(mlp, *given), relative_errors(plain(mlp, *given, torch.float32), exact(mlp, *given))
    found = relative_errors(evaluate(mlp, *given), want)
    for quantity in ("all outputs", "all gradients"):
        assert found[quantity] <= 2 * bound[quantity]
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(outputs, mlp(*given), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shape", [*SHAPES.values(), NO_VIEW_LAYER, PRESET], ids=[*SHAPES, "no view layer", "3 x 64"]
)
@pytest.mark.parametrize(("rays", "samples"), [(1, 1), (3, 5), (7, 17), (2, 128)])
def test_tiles_are_the_products(
    shape: MlpShape, rays: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass in the library and that in torch's products: the same outputs, and what is kept of every layer.

    No width here is a multiple of a tile's outputs, and no number of samples one of its samples.
    """
    mlp, (features, viewdirs_enc) = Engine("folded", "fp32", "cpu").build(shape), inputs(shape, rays, samples)
    parameters = [p.detach() for linear in mlp.linears for p in (linear.weight, linear.bias)]
    options = (shape.net_depth, shape.net_depth_condition, shape.skip_layer, TORCH, torch.float32)
    assert mlp_folded_network._HAS_TILES
    with monkeypatch.context() as patch:
        patch.setattr(mlp_folded_network, "_HAS_TILES", False)
        network = Network(features, viewdirs_enc, parameters, options)
        want = forward_pass(network, features, viewdirs_enc, True)
    network = Network(features, viewdirs_enc, parameters, options)
    got = forward_pass(network, features, viewdirs_enc, True)
    assert len(got[2]) == len(want[2])
    for a, b in zip([*got[:2], *got[2]], [*want[:2], *want[2]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("columns", [0, 5, 40])
@pytest.mark.parametrize(
    ("samples", "outputs", "inputs_"), [(1, 3, 7), (47, 65, 33), (256, 70, 64), (300, 300, 20), (0, 8, 8)]
)
def test_a_layers_way_down(samples: int, outputs: int, inputs_: int, columns: int, add: bool) -> None:
    """Every gradient of a layer against float64, in rows of wider matrices, and nothing beside them changed.

    Sums of up to 300 products of size about 1, in float32.
    """
    delta, weight = matrices((samples, outputs), (outputs, inputs_))
    x, beside = matrices((samples, inputs_), (samples, columns))
    x = x.relu() if samples else x
    given = [m.float() for m in (delta, x, weight, beside)]
    room = [torch.randn(rows, wide + 3) for rows, wide in ((samples, inputs_), (outputs, inputs_ + columns))]
    below, grad_weight = room[0][:, 1:-2], room[1][:, 1:-2]
    grad_bias, edges = torch.randn(outputs), [m[:, [0, -2, -1]].clone() for m in room]
    before = [m.double() * add for m in (grad_weight, grad_bias)]
    way_down: Any = torch.ops.mipnerf_fast.mlp_layer_backward
    others = given[3] if columns else None
    rays = samples if samples % 2 else max(1, samples // 2)
    ray_sums, want_of_rays = torch.randn(rays, outputs), delta.unflatten(0, (rays, -1)).sum(1)[:, :-2]
    for out, of_rays in ((below, ray_sums[:, :-2]), (None, None)):
        if out is None and not add:
            grad_weight.fill_(float("nan"))
        elif out is None:
            grad_weight.copy_(before[0]), grad_bias.copy_(before[1])
        way_down(given[0], given[1], others, given[2], out, grad_weight, grad_bias, of_rays, add)
        for got, want in (
            (grad_weight, before[0] + delta.t() @ torch.cat([x, beside], 1)),
            (grad_bias, before[1] + delta.sum(0)),
            (below, (delta @ weight) * (x > 0)),
            (ray_sums[:, :-2], want_of_rays),
        ):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
        for m, edge in zip(room, edges, strict=True):
            assert torch.equal(m[:, [0, -2, -1]], edge)


def test_a_layers_way_down_refuses_what_does_not_fit() -> None:
    arguments = [torch.rand(6, 4), torch.rand(6, 8), None, torch.rand(4, 8), torch.rand(6, 8)]
    arguments += [torch.rand(4, 8), torch.rand(4), torch.rand(2, 3), False]
    way_down: Any = torch.ops.mipnerf_fast.mlp_layer_backward
    for number, value, message in (
        (0, torch.rand(6, 4).double(), "delta must be float32, got float64"),
        (0, torch.rand(4, 6).t(), "delta must be of rows without gaps, got 6"),
        (1, torch.rand(5, 8), r"x must be of shape \[6, 8\] \(\[S, K\]\), got \[5, 8\]"),
        (2, torch.rand(5, 8), r"beside must be of shape \[6, 8\]"),
        (2, torch.rand(6, 2), r"grad_weight must be of shape \[4, 10\]"),
        (3, torch.rand(4, 7), r"weight must be of shape \[4, 8\]"),
        (4, torch.rand(6, 7), r"below must be of shape \[6, 8\]"),
        (5, torch.rand(4, 8).half(), "grad_weight must be float32 as delta, got float16"),
        (6, torch.rand(5), r"grad_bias must be of shape \[4\]"),
        (7, torch.rand(2, 5), "ray_sums must be of at most as many columns as delta, got 5"),
        (7, torch.rand(4, 3), "ray_sums must be of rays with as many samples each, got 4"),
    ):
        changed = [*arguments[:number], value, *arguments[number + 1 :]]
        with pytest.raises(RuntimeError, match=f"mlp_layer_backward: {message}"):
            way_down(*changed)


def test_products_are_let_go_between_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU have a workspace of 32 MB each."""
    made: list[weakref.ref[TorchGemm]] = []

    def products_of(products: int, dtype: torch.dtype, device: torch.device) -> TorchGemm:
        made.append(weakref.ref(engine := TorchGemm(dtype)))
        return engine

    monkeypatch.setattr(mlp_folded_network, "gemm_of", products_of)
    mlp, (features, viewdirs_enc) = Engine("folded", "fp32", "cpu").build(PRESET), inputs(PRESET, 2, 30)
    rgb, density = run_folded(mlp, features, viewdirs_enc, torch.bfloat16)
    assert len(made) == 1 and made[0]() is None
    (rgb.sum() + density.sum()).backward()
    assert len(made) == 2


@pytest.mark.parametrize("samples", [1, 37])
def test_few_samples_go_down_in_the_library(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients that torch's products give, of every parameter; with the first layer done again and without."""
    for shape in (MlpShape(), PRESET):
        mlp, (features, viewdirs_enc) = (
            Engine("folded", "fp32", "cpu").build(shape),
            inputs(shape, 5, samples),
        )

        def gradients(mlp: Any = mlp, given: Any = (features, viewdirs_enc)) -> list[Tensor]:
            rgb, density = mlp(*given)
            return [*torch.autograd.grad((rgb.square().sum() + density.square().sum()), [*mlp.parameters()])]

        with monkeypatch.context() as patch:
            layers = Mock(wraps=mlp_folded_backward._in_one_pass)
            patch.setattr(mlp_folded_backward, "_in_one_pass", layers)
            got, ways_down = gradients(), layers.call_count
            patch.setattr(mlp_folded_network, "_FEW_ROWS", 0)
            want = gradients()
        assert ways_down == layers.call_count > shape.net_depth
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_nan_passes_every_relu() -> None:
    """And makes its own sample NaN, no other."""
    mlp, (features, viewdirs_enc) = Engine("folded", "fp32", "cpu").build(PRESET), inputs(PRESET, 2, 30)
    clean = mlp(features, viewdirs_enc)
    features[1, 7, 3] = float("nan")
    for got, want in zip(mlp(features, viewdirs_enc), clean, strict=True):
        assert got[1, 7].isnan().all() and got.isnan().any(-1).sum() == 1
        assert torch.equal(got.nan_to_num(0) * ~got.isnan(), want * ~got.isnan())


def test_the_tiles_operator_refuses_what_does_not_fit() -> None:
    features, directions = torch.rand(6, 8), torch.rand(2, 5)
    # A trunk of one layer, density, the bottleneck, the layer over it and colour.
    weights = [torch.rand(size) for size in ((16, 8), (1, 16), (16, 16), (4, 21), (3, 4))]
    parameters = [p for weight in weights for p in (weight, torch.rand(weight.shape[0]))]
    arguments = [features, directions, parameters, 1, 4, 4]
    tiles: Any = torch.ops.mipnerf_fast.mlp_tiles_forward
    assert [x.shape for x in tiles(*arguments)] == [(6, 3), (6, 1), (5, 16)]
    assert [x.shape for x in tiles(*arguments[:5], 0)] == [(6, 3), (6, 1), (6, 16), (6, 4), (5, 16)]

    def changed(number: int, value: Tensor) -> list[Tensor]:
        return [*parameters[:number], value, *parameters[number + 1 :]]

    for number, value, message in (
        (0, features.double(), "features must be float32, got float64"),
        (0, features[0], r"features must be of shape \[S, F\]"),
        (1, directions[0], r"viewdirs_enc must be of shape \[B, V\], got \[5\]"),
        (1, torch.rand(4, 5), "viewdirs_enc must be of rays with as many samples each, got 4"),
        (1, directions.double(), "viewdirs_enc must be float32 as features, got float64"),
        (
            2,
            parameters[:6],
            "parameters must be weight and bias of the trunk's layers, density, the bottleneck",
        ),
        (2, parameters[:-1], "parameters must be weight and bias of the trunk's layers"),
        (2, changed(0, torch.rand(16, 9)), r"parameters must be of shape \[16, 8\] \(of a layer\)"),
        (2, changed(1, torch.rand(5)), r"parameters must be of shape \[16\] \(of a bias\)"),
        (2, [*parameters[:2], torch.rand(2, 16), *parameters[3:]], "parameters must be one row for density"),
        (2, changed(4, torch.rand(16, 9)), r"parameters must be of shape \[16, 16\] \(of the bottleneck\)"),
        (2, changed(5, torch.rand(3)), r"parameters must be of shape \[16\] \(of the bottleneck's bias\)"),
        (2, changed(6, torch.rand(4, 16)), r"parameters must be of shape \[4, 21\] \(of the layer over"),
        (2, changed(8, torch.rand(4, 4)), "parameters must be three rows for colour, got 4"),
        (2, changed(0, weights[0].double()), "parameters must be float32 as features, got float64"),
        (4, 0, "skip_layer must be 1 or more, got 0"),
    ):
        given = [*arguments[:number], value, *arguments[number + 1 :]]
        with pytest.raises(RuntimeError, match=f"mlp_tiles_forward: {message}"):
            tiles(*given)


@pytest.mark.parametrize("views", [True, False])
def test_the_raw_operators_pass_opcheck_and_refuse_derivatives(views: bool) -> None:
    """Schema and fake kernel; an input that asks for a gradient raises instead of going without one."""
    mlp, given = Engine("folded", "fp32", "cpu").build(PRESET if views else NO_VIEWS), inputs(PRESET, 2, 5)
    features, viewdirs_enc = given[0].flatten(0, 1), given[1] if views else None
    parameters = [p.detach() for linear in mlp.linears for p in (linear.weight, linear.bias)]
    tiles: Any = torch.ops.mipnerf_fast.mlp_tiles_forward
    for first_kept in (0, 1, 99):
        torch.library.opcheck(tiles, (features, viewdirs_enc, parameters, 3, 4, first_kept))
    with pytest.raises(
        RuntimeError, match="mlp_tiles_forward: the raw operator has no derivative of its own"
    ):
        tiles(features.requires_grad_(), viewdirs_enc, parameters, 3, 4, 0)[0].sum().backward()
    way_down: Any = torch.ops.mipnerf_fast.mlp_layer_backward
    x = [torch.rand(6, 4), torch.rand(6, 8), torch.rand(6, 2), torch.rand(4, 8), torch.rand(6, 8)]
    rest = (torch.rand(4, 10), torch.rand(4), torch.rand(2, 3), views)
    torch.library.opcheck(way_down, (*x, *rest))
    with pytest.raises(
        RuntimeError, match="mlp_layer_backward: the raw operator has no derivative of its own"
    ):
        way_down(x[0].requires_grad_(), *x[1:], *rest)
    with torch.no_grad():
        way_down(*x, *rest)


# ------------------------------------------------------------------------------------------------ the products


def matrices(*shapes: tuple[int, int]) -> list[Tensor]:
    """Columns 8 to 8 + n of wider matrices: rows are apart, as those of a layer that reads the skip."""
    return [torch.randn(rows, columns + 16, dtype=DOUBLE)[:, 8 : 8 + columns] for rows, columns in shapes]


@pytest.mark.filterwarnings("ignore:gemm. cuBLASLt has no algorithm")
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("kind", GEMMS)
def test_products(kind: str, beta: float, make_gemm: Callable[[str], Any]) -> None:
    """Every product and epilogue against its formula in float64 on the same rounded operands.

    Sums are float32: 64 terms of size about 1 are off by less than 64 x 2^-24 x sqrt(64); the result is rounded once.
    """
    engine = make_gemm(kind)
    dtype = engine.dtype
    sums = DOUBLE if dtype == DOUBLE else torch.float32
    x, weight, start, delta = matrices((21, 64), (40, 64), (21, 40), (21, 40))
    x, weight, delta = (m.to(dtype) for m in (x, weight, delta))
    bias = torch.randn(40).to(dtype)
    exact = [m.double() for m in (x, weight, delta, bias)]

    def close(got: Tensor, want: Tensor, factor: float = 1.0) -> None:
        assert (got.double() - want).abs().max() <= factor * (
            torch.finfo(got.dtype).eps * want.abs().max() + 64 * 2**-24 * 8
        )

    out = start.to(dtype)
    mask = engine.new_mask(out)
    before = out.double().clone()
    # A bias goes with a product that is added to nothing.
    given = None if beta else bias
    assert engine.forward(x, weight, out, beta=beta, bias=given, relu=True, mask=mask) is out
    want = exact[0] @ exact[1].T + (beta * before if beta else exact[3])
    # torch rounds its product once more where it adds to it in 16 bits.
    close(out, want.relu(), 2 if beta else 1)
    if engine.bit_masks:
        # Bit n % 8 of byte n // 8; rows are whole multiples of 128 bits.
        assert mask.shape == (21, 16) and mask.dtype == torch.uint8
        bits = torch.stack([(mask[:, n // 8] >> n % 8) & 1 for n in range(40)], 1)
        assert torch.equal(bits == 1, out > 0)
    passed = (out > 0).double()

    for result in (dtype, sums):
        down, again = torch.randn(21, 64).to(result), torch.randn(21, 40).to(result)
        before = down.double().clone()
        engine.grad_input(delta, weight, down, beta=beta)
        # torch rounds its product once more where it adds to it in 16 bits.
        close(down, exact[2] @ exact[1] + beta * before, 2)
        before = again.double().clone()
        engine.forward(x, weight, again, beta=beta)
        close(again, exact[0] @ exact[1].T + beta * before, 2)
    # Into columns of a wider matrix, as on the trunk's output.
    wider = torch.randn(21, 48).to(dtype)
    masked, beside = wider[:, :40], wider[:, 40:].clone()
    before = masked.double().clone()
    square = torch.randn(40, 40).to(dtype)
    engine.grad_input(delta, square, masked, beta=beta, mask=mask)
    close(masked, (exact[2] @ square.double() + beta * before) * passed, 2)
    assert torch.equal(wider[:, 40:], beside)

    grad, grad_bias = torch.randn(40, 64).to(sums), torch.randn(40).to(sums)
    before, before_bias = beta * grad.double(), beta * grad_bias.double()
    grad, grad_bias = engine.grad_layer(delta, x, (grad, grad_bias) if beta else None)
    assert grad.dtype == grad_bias.dtype == sums
    for got, product, start in (
        (grad, exact[2].T @ exact[0], before),
        (engine.grad_weight(delta, x), exact[2].T @ exact[0], 0),
        (grad_bias, exact[2].sum(0), before_bias),
        (engine.sums(delta.view(7, 3, 40), 1), exact[2].view(7, 3, 40).sum(1), 0),
    ):
        if kind == "torch-bfloat16":
            # What torch rounds before it is added.
            assert (got.double() - product - start).abs().max() <= 2**-8 * product.abs().max()
        else:
            close(got, product + start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [31, 33, 40, 129])
def test_products_of_columns_know_nothing_of_those_beside(columns: int, dtype: torch.dtype) -> None:
    """Where the rest of a wider matrix is NaN: bfloat16 products with AMX read on behind the last column."""
    engine = TorchGemm(dtype)
    wider = torch.full((70, 256), float("nan"), dtype=dtype)
    x = wider[:, :columns].copy_(torch.randn(70, columns))
    weight, out = torch.randn(64, columns).to(dtype), torch.empty(70, 64, dtype=dtype)
    for product in (
        engine.forward(x, weight),
        engine.forward(x, weight, out),
        engine.grad_input(x, weight.t().contiguous()),
        engine.grad_input(x, weight.t().contiguous(), out),
        engine.grad_weight(x, torch.randn(70, 64).to(dtype)),
        engine.grad_weight(torch.randn(70, 64).to(dtype), x),
    ):
        assert product.isfinite().all()


@pytest.mark.filterwarnings("ignore:gemm. cuBLASLt has no algorithm")
@pytest.mark.parametrize("kind", GEMMS)
@pytest.mark.parametrize("given", [False, True])
def test_biases_of_rays_and_of_heads(kind: str, given: bool, make_gemm: Callable[[str], Any]) -> None:
    """A row for every 7 of 21; a float32 bias over 16-bit operands makes the result float32."""
    engine = make_gemm(kind)
    dtype = engine.dtype
    x, weight = (m.to(dtype) for m in matrices((21, 64), (40, 64)))
    product = x.double() @ weight.double().T
    raw = DOUBLE if dtype == DOUBLE else torch.float32
    for bias in (torch.randn(3, 40).to(dtype), torch.randn(40).to(raw), torch.randn(3, 40).to(raw)):
        out = torch.empty(21, 40, dtype=bias.dtype) if given else None
        got = engine.forward(x, weight, out, bias=bias)
        assert got.dtype == bias.dtype and (got is out or not given)
        want = product + (bias.repeat_interleave(7, 0) if bias.dim() == 2 else bias).double()
        allowed = 2 * torch.finfo(got.dtype).eps * want.abs().max() + 64 * 2**-24 * 8
        assert (got.double() - want).abs().max() <= allowed


def test_the_twin_refuses_what_cublaslt_does() -> None:
    twin = CublasLtTwin(torch.bfloat16)
    x, weight, out = (torch.randn(8, 8).bfloat16() for _ in range(3))
    with pytest.raises(TypeError, match=r"operands must be torch\.bfloat16, got torch\.float32"):
        twin.forward(x.float(), weight, out)
    with pytest.raises(TypeError, match=r"bias must be torch\.bfloat16 as the result, got torch\.float32"):
        twin.forward(x, weight, out, bias=torch.zeros(8))


def test_the_twin_catches_a_wrong_mask(use_gemm: Any) -> None:
    """The masks are what the backward pass goes by: with one bit of each wrong the gradients are."""
    engine = Engine("emulated", "bf16", "cpu")
    shape = SHAPES["64 wide"]
    right = evaluate(engine.build(shape), *inputs(shape, 4, 16))

    class Wrong(CublasLtTwin):
        def forward(self, x: Tensor, weight: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
            result = super().forward(x, weight, out, **options)
            if options.get("mask") is not None:
                options["mask"][0, 0] ^= 1
            return result

    use_gemm(TWIN, Wrong(torch.bfloat16))
    wrong = evaluate(engine.build(shape), *inputs(shape, 4, 16))
    assert torch.equal(wrong["rgb"], right["rgb"])
    assert not torch.equal(wrong["linears.0.weight"], right["linears.0.weight"])


@pytest.mark.parametrize("kind", list(REFUSED))
@pytest.mark.parametrize("shape", ["64 wide", "heads read the skip", "two skips, no views", "no view layer"])
def test_the_network_over_cublaslts_operator(
    kind: str, shape: str, use_cublaslt: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward through the operator's C++: as far from float64 as by the twin, outputs and gradients.

    Where cuBLASLt has no algorithm the numbers are as good, and a warning names every epilogue that is missing.
    """
    sizes = SHAPES.get(shape, NO_VIEW_LAYER)
    network, given = Engine("emulated", "bf16", "cpu").build(sizes), inputs(sizes, 6, 16)
    want = exact(network, *given)
    twin = relative_errors(evaluate(network, *given), want)
    use_cublaslt(kind)
    monkeypatch.setitem(mlp._PRODUCTS, "emulated", CUBLASLT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = relative_errors(evaluate(network, *given), want)
    for quantity in ("all outputs", "all gradients"):
        assert 0 < found[quantity] <= 1.5 * twin[quantity]
    named = {str(warning.message).split('"')[1] for warning in caught}
    missing = {name for number, name in enumerate(gemm._EPILOGUES) if REFUSED[kind] >> number & 1}
    assert named <= missing
    if kind != "cublaslt":
        assert {"bias, ReLU and mask", "ReLU's mask", "column sums"} <= named


def test_masks_and_biases_of_any_alignment(use_cublaslt: Callable[[str], None]) -> None:
    """Each has an algorithm of its own: cuBLASLt goes by how both pointers are aligned when it chooses one."""
    use_cublaslt("cublaslt")
    engine = CublasLt(torch.bfloat16, torch.device("cpu"))
    x, weight = (torch.randn(shape).bfloat16() for shape in ((20, 64), (40, 64)))
    masks, biases = torch.zeros(24, 16, dtype=torch.uint8), torch.randn(48).bfloat16()
    out = torch.empty(20, 40).bfloat16()
    # One of the two moved, everything else where it was.
    for of_mask, of_bias in ((0, 0), (1, 0), (0, 0), (0, 1)):
        mask, bias = masks[of_mask : of_mask + 20], biases[of_bias : of_bias + 40]
        engine.forward(x, weight, out, bias=bias, relu=True, mask=mask)
        want = (x.double() @ weight.double().T + bias.double()).relu()
        assert (out.double() - want).abs().max() <= torch.finfo(out.dtype).eps * want.abs().max()
        assert torch.equal(gemm._bits(mask, 40) == 1, out > 0)


def test_the_operator_refuses_what_does_not_fit(use_cublaslt: Callable[[str], None]) -> None:
    """Its checks, and what cuBLASLt itself says no to arrive as errors that name the argument."""
    use_cublaslt("cublaslt")
    a, b, out, workspace = (torch.zeros(8, 8).bfloat16() for _ in range(4))
    mask = torch.zeros(8, 16, dtype=torch.uint8)
    product: Any = gemm._cublaslt
    for change, message in (
        ({"a": a.float()}, "a must be bfloat16 or float16, got float32"),
        ({"b": b.half()}, "b must be bfloat16 as a, got float16"),
        ({"out": out[:, :4]}, r"out must be of shape \[8, 8\] \(rows, columns\), got \[8, 4\]"),
        ({"a": a.t()}, "a must be with contiguous rows"),
        ({"epilogue": gemm._BIAS}, "vector must be there exactly where the epilogue takes one"),
        ({"epilogue": gemm._BIAS, "vector": torch.zeros(8)}, "vector must be bfloat16 as out"),
        ({"epilogue": gemm._DRELU}, "mask must be there exactly where the epilogue takes one"),
        ({"epilogue": gemm._DRELU, "mask": mask[:, :8]}, r"mask must be of shape \[8, 16\]"),
        ({"epilogue": 8}, "epilogue must be 0 to 7, got 8"),
        # A mask whose rows are no multiples of 128 bits apart: cuBLASLt's own rule.
        (
            {"epilogue": gemm._DRELU, "mask": torch.zeros(8, 17, dtype=torch.uint8)[:, :16]},
            "choosing an algorithm: CUBLAS_STATUS_INVALID_VALUE",
        ),
    ):
        arguments = {
            "a": a,
            "b": b,
            "out": out,
            "transpose_a": False,
            "transpose_b": True,
            "beta": 0.0,
            "epilogue": gemm._NONE,
            "vector": None,
            "mask": None,
            "workspace": workspace,
        }
        assert product(**arguments) is True
        with pytest.raises(RuntimeError, match=f"gemm_cublaslt: {message}"):
            product(**(arguments | change))


def test_float16_survives_gradients_of_any_size() -> None:
    """Gradients of 1e-9 are nothing in float16 and those of 1e9 infinite; scaled by a power of two they are as good."""
    shape = SHAPES["64 wide"]
    mlp, given = Engine("emulated", "fp16", "cpu").build(shape), inputs(shape, 4, 16)
    parameters, grads = list(mlp.parameters()), {}
    for exponent in (-30, 0, 30):
        rgb, density = mlp(*given)
        loss = (rgb.sum() + density.sum()) * 2.0**exponent
        grads[exponent] = torch.autograd.grad(loss, parameters)
    for exponent in (-30, 30):
        for a, b in zip(grads[exponent], grads[0], strict=True):
            assert torch.equal(a * 2.0**-exponent, b)


# ----------------------------------------------------------------------------------------------- the operators


@pytest.mark.parametrize(("products", "dtype"), [(TORCH, torch.float32), (TWIN, torch.bfloat16)])
@pytest.mark.parametrize("shape", ["64 wide", "two skips, no views"])
def test_opcheck(shape: str, products: int, dtype: torch.dtype) -> None:
    """Schema, fake kernel and registration of both operators."""
    sizes = SHAPES[shape]
    features, viewdirs_enc = inputs(sizes, 3, 5)
    mlp = Engine("reference", "auto", "cpu").build(sizes)
    parameters = [p.detach().requires_grad_() for linear in mlp.linears for p in (linear.weight, linear.bias)]
    architecture = (sizes.net_depth, sizes.net_depth_condition, sizes.skip_layer)
    forward, backward = (
        getattr(torch.ops.mipnerf_fast, f"mlp_folded_{name}").default for name in ("forward", "backward")
    )
    arguments = (features.requires_grad_(), viewdirs_enc, parameters, *architecture, products, dtype, True)
    torch.library.opcheck(forward, arguments)
    with torch.no_grad():
        rgb, density, stash = forward(*arguments)
        for to_features in (False, True):
            torch.library.opcheck(
                backward,
                (
                    rgb,
                    None,
                    features,
                    viewdirs_enc,
                    parameters,
                    stash,
                    *architecture,
                    products,
                    dtype,
                    to_features,
                ),
            )
    del density


def test_the_raw_operator_differentiates() -> None:
    """Called directly it has the gradients of the public function."""
    sizes = SHAPES["64 wide"]
    features, viewdirs_enc = inputs(sizes, 3, 5)
    mlp = Engine("folded", "fp32", "cpu").build(sizes)
    parameters = [p for linear in mlp.linears for p in (linear.weight, linear.bias)]
    rgb, density, _ = torch.ops.mipnerf_fast.mlp_folded_forward(
        features, viewdirs_enc, parameters, 8, 1, 4, TORCH, torch.float32, True
    )
    got = torch.autograd.grad(rgb.sum() + density.sum(), parameters)
    rgb, density = mlp(features, viewdirs_enc)
    for a, b in zip(got, torch.autograd.grad(rgb.sum() + density.sum(), parameters), strict=True):
        assert torch.equal(a, b)
