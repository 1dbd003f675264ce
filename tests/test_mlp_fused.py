"""The way from the network's parameters to the fused kernels and from their gradients back.

Over twins in float64 it is exact; over the emulated kernels its error is compared with autocast's.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import test_mlp_hopper
import torch
from cuda_emulation.harness import run
from test_mlp_kernels import program_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mipnerf_fast import MipNerf, MipNerfConfig, _native, cameras, reference, use_backend, verification_mlp
from mipnerf_fast.ops import MipMLP, MlpChoice, keeping_weights, mlp_fused_network
from mipnerf_fast.ops.arguments import DENSITY_ACTIVATIONS, RGB_ACTIVATIONS
from mipnerf_fast.ops.mlp_autograd import Architecture
from mipnerf_fast.ops.mlp_fused import fused_mlp, why_not_composited, why_not_fused
from mipnerf_fast.ops.mlp_fused_network import Kernels, Sizes
from mipnerf_fast.rendering import render_image

# features, view features (None: no views), width, depth, view width, view depth, skip
SHAPES = [
    (12, 5, 16, 3, 8, 1, 4),
    (12, 5, 16, 6, 8, 2, 4),
    (6, 3, 16, 3, 16, 3, 2),  # the heads and the first view layer read the features again
    (6, None, 16, 4, 8, 1, 3),
    (10, None, 16, 1, 8, 1, 4),
]


def twin_layers(flat: Tensor, features: int, sizes: Sizes) -> list[tuple[Tensor, Tensor]]:
    """The folded layers in the array that csrc/mlp/mlp_plan.h describes."""

    def skip(before: int) -> int:
        return features if before > 1 and (before - 1) % sizes.skip_layer == 0 else 0

    shapes = [(sizes.width, (sizes.width if i else features) + skip(i)) for i in range(sizes.depth)]
    top = sizes.width + skip(sizes.depth)
    shapes.append((1, top))
    shapes += [(sizes.view_width, sizes.view_width if i else top) for i in range(sizes.view_depth)]
    shapes.append((3, sizes.view_width if sizes.view_depth else top))
    layers, at = [], 0
    for rows, columns in shapes:
        bias_at = at + -(-rows * columns // 4) * 4
        layers.append((flat[at : at + rows * columns].view(rows, columns), flat[bias_at : bias_at + rows]))
        at = bias_at + -(-rows // 4) * 4
    assert flat.numel() == at
    return layers


def twin_network(
    features: Tensor, ray_bias: Tensor | None, flat: Tensor, samples_per_ray: int, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    layers = twin_layers(flat, features.shape[1], sizes)
    x = features
    for i, (weight, bias) in enumerate(layers[: sizes.depth]):
        x = torch.relu(x @ weight.T + bias)
        if i % sizes.skip_layer == 0 and i > 0:
            x = torch.cat([x, features], 1)
    weight, bias = layers[sizes.depth]
    density = x @ weight.T + bias
    for i, (weight, bias) in enumerate(layers[sizes.depth + 1 : -1]):
        if i == 0:
            assert ray_bias is not None
            x = torch.relu(x @ weight.T + ray_bias.repeat_interleave(samples_per_ray, 0))
        else:
            x = torch.relu(x @ weight.T + bias)
    weight, bias = layers[-1]
    return x @ weight.T + bias, density[:, 0]


def twin_forward(
    features: Tensor, ray_bias: Tensor | None, packed: Tensor, samples_per_ray: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *sizes, training = options
    rgb, density = twin_network(features, ray_bias, packed, samples_per_ray, Sizes(*sizes))
    kept = ray_bias if training and ray_bias is not None else features.new_empty(0)
    return rgb, density, kept, features.new_empty(0)


def twin_backward(
    grad_rgb: Tensor | None,
    grad_density: Tensor | None,
    features: Tensor,
    packed: Tensor,
    activations: Tensor,
    masks: Tensor,
    samples_per_ray: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, _, to_features = options
    sizes = Sizes(*numbers)
    flat, x = packed.clone().requires_grad_(), features.clone().requires_grad_()
    ray_bias = activations.clone().requires_grad_() if sizes.view_depth else None
    with torch.enable_grad():
        outputs = twin_network(x, ray_bias, flat, samples_per_ray, sizes)
        loss = torch.zeros((), dtype=features.dtype)
        for output, grad in zip(outputs, (grad_rgb, grad_density), strict=True):
            if grad is not None:
                loss = loss + (output * grad).sum()
    inputs = [flat, x] + ([] if ray_bias is None else [ray_bias])
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    gradients, grad_features = grads[0].clone(), grads[1]
    ray_sums = grads[2] if ray_bias is not None else features.new_empty(len(features) // samples_per_ray, 0)
    if sizes.view_depth:
        twin_layers(gradients, features.shape[1], sizes)[sizes.depth + 1][1].copy_(ray_sums.sum(0))
    return gradients, ray_sums, grad_features if to_features else grad_features[:0]


def twin_encoded(
    t_vals: Tensor,
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    ray_bias: Tensor | None,
    packed: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    min_deg, max_deg, cylinder, integrated, *sizes, _ = options
    shape = "cylinder" if cylinder else "cone"
    features = reference.frustum_ipe(
        t_vals, origins, directions, radii, min_deg, max_deg, shape, integrated=integrated
    )
    rgb, density = twin_network(features.flatten(0, 1), ray_bias, packed, t_vals.shape[1] - 1, Sizes(*sizes))
    return rgb, density


def twin_composited(t_vals: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, white_background, density, density_bias, rgb, rgb_padding = rest
    raw_rgb, raw_density = twin_encoded(t_vals, *inputs)
    count, samples = t_vals.shape[0], t_vals.shape[1] - 1
    return reference.composite(
        raw_rgb.view(count, samples, 3),
        raw_density.view(count, samples, 1),
        t_vals,
        inputs[1],
        white_background,
        density_activation=list(DENSITY_ACTIVATIONS)[density],
        density_bias=density_bias,
        rgb_activation=list(RGB_ACTIVATIONS)[rgb],
        rgb_padding=rgb_padding,
    )


TWINS = Kernels(lambda flat, *_: flat.clone(), twin_forward, twin_backward, twin_encoded, twin_composited)


def take(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_fused_network, "operators", lambda: kernels)


def make(shape: tuple[Any, ...], seed: int = 0) -> tuple[Tensor, Tensor | None, list[Tensor], Architecture]:
    features, views, width, depth, view_width, view_depth, skip = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).requires_grad_()

    shapes = reference.mip_mlp_shapes(features, views, depth, width, view_depth, view_width, skip)
    parameters = [tensor for i, o in shapes for tensor in (random(o, i), random(o))]
    directions = None if views is None else random(3, views)
    return random(3, 7, features), directions, parameters, Architecture(depth, view_depth, skip)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outputs", ["both", "rgb", "density"])
def test_function_and_gradients(
    shape: tuple[Any, ...], outputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(TWINS, monkeypatch)
    features, directions, parameters, architecture = make(shape)
    linears = [torch.nn.Linear(*w.shape[::-1], dtype=w.dtype) for w in parameters[0::2]]
    for linear, weight, bias in zip(linears, parameters[0::2], parameters[1::2], strict=True):
        linear.weight, linear.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    wanted = reference.mip_mlp(features, directions, linears, *architecture)
    given = fused_mlp(features, directions, parameters, architecture, torch.float64)
    inputs = [features, *([] if directions is None else [directions])]
    of_reference = [p for linear in linears for p in (linear.weight, linear.bias)]
    gradients = []
    for (rgb, density), leaves in ((wanted, of_reference), (given, parameters)):
        loss = torch.zeros((), dtype=torch.float64)
        if outputs != "density":
            loss = loss + (rgb * torch.linspace(-1, 2, rgb.numel(), dtype=rgb.dtype).view_as(rgb)).sum()
        if outputs != "rgb":
            loss = loss + (density**2).sum()
        gradients.append(
            torch.autograd.grad(loss, [*inputs, *leaves], allow_unused=True, materialize_grads=True)
        )
    # Sums of at most some thousand terms in float64, with cancellation.
    for one, other in zip((*wanted, *gradients[0]), (*given, *gradients[1]), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(
            other, one, rtol=1e-9, atol=1e-9 * float(one.detach().abs().max() + 1e-300)
        )


def test_no_gradient_to_the_features_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    features, directions, parameters, architecture = make(SHAPES[0])
    asked = []

    def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(arguments[-1])
        return twin_backward(*arguments)

    take(TWINS._replace(backward=backward), monkeypatch)
    for wanted in (False, True):
        features.requires_grad_(wanted)
        rgb, _ = fused_mlp(features, directions, parameters, architecture, torch.float64)
        rgb.sum().backward()
        assert asked[-1] is wanted and (features.grad is not None) is wanted


def test_half_is_scaled_and_scaled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients a million times too small for float16 arrive at the kernels in its range, and come back exact."""
    features, directions, parameters, architecture = make(SHAPES[0])
    seen = []

    def forward(x: Tensor, *rest: Any) -> Any:
        return twin_forward(x.double(), *rest)

    def backward(grad_rgb: Tensor, grad_density: None, x: Tensor, *rest: Any) -> Any:
        seen.append(float(grad_rgb.abs().max()))
        return twin_backward(grad_rgb, grad_density, x.double(), *rest)

    take(TWINS._replace(forward=forward, backward=backward), monkeypatch)
    found = []
    for size in (1.0, 2.0**-40):
        rgb, _ = fused_mlp(features, directions, parameters, architecture, torch.float16)
        found.append(torch.autograd.grad((rgb * size).sum(), parameters, allow_unused=True))
    assert all(4 < largest <= 8 for largest in seen)
    for one, other in zip(*found, strict=True):
        if one is not None:
            torch.testing.assert_close(other * 2.0**40, one, rtol=1e-12, atol=0)


def test_a_second_derivative_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    take(TWINS, monkeypatch)
    features, directions, parameters, architecture = make(SHAPES[0])
    rgb, _ = fused_mlp(features, directions, parameters, architecture, torch.float64)
    (grad,) = torch.autograd.grad(rgb.square().sum(), parameters[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]])
def test_compiled_is_eager(shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients that are no derivatives but go the same way: autograd is not there within an operator."""

    def backward(
        grad_rgb: Tensor, grad_density: Tensor, features: Tensor, packed: Tensor, kept: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        ray_sums = kept * grad_density.mean() if kept.numel() else packed.new_empty(3, 0)
        return packed * grad_rgb.sum(), ray_sums, features * 2 if rest[-1] else features[:0].clone()

    take(TWINS._replace(backward=backward), monkeypatch)
    torch.compiler.reset()
    features, directions, parameters, architecture = make(shape)

    def loss() -> Tensor:
        rgb, density = fused_mlp(features, directions, parameters, architecture, torch.float64)
        return rgb.square().sum() + density.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(loss(), parameters), torch.autograd.grad(compiled(), parameters), strict=True
    ):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("samples", [1, 128, 129])
def test_shapes_for_the_compiler(samples: int) -> None:
    """The operators' fake kernels agree with each other, and with the sizes that the library computes."""
    assert _native.available(), _native.why_missing()
    _, _, parameters, architecture = make((96, 27, 256, 8, 128, 1, 4))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(tensor.detach().float()).requires_grad_() for tensor in parameters]
        x = mode.from_tensor(torch.empty(2, samples, 96)).requires_grad_()
        views = mode.from_tensor(torch.empty(2, 27))
        rgb, density = fused_mlp(x, views, fakes, architecture, torch.bfloat16)
        assert rgb.shape == (2, samples, 3) and density.shape == (2, samples, 1)
        (rgb.sum() + density.sum()).backward()
        assert all(fake.grad is not None and fake.grad.shape == fake.shape for fake in [x, *fakes])


def test_why_not() -> None:
    sizes, cpu, bfloat16 = Sizes(256, 8, 4, 128, 1), torch.device("cpu"), torch.bfloat16
    assert "on cpu" in why_not_fused(96, sizes, cpu, torch.float32, bfloat16)


# ---- inference from rays

SMALL = {"num_samples": 64, "net_width": 16, "net_depth": 3, "net_width_condition": 8, "max_deg_point": 4}


def fused_model(monkeypatch: pytest.MonkeyPatch, kernels: Kernels = TWINS, **changes: Any) -> MipNerf:
    """A float64 model whose networks take the fused engine, over twins of its kernels."""
    take(kernels, monkeypatch)
    choice = MlpChoice("fused", torch.float64, "for a test")
    monkeypatch.setattr(MipMLP, "implementation", property(lambda _: choice))
    torch.manual_seed(0)
    model = MipNerf(MipNerfConfig(**{**SMALL, **changes})).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def some_rays() -> cameras.Rays:
    rays = cameras.pinhole_rays(torch.eye(4)[:3], height=3, width=4, focal=3.0)
    return cameras.Rays(*(field.double() for field in rays))


@pytest.mark.parametrize(
    ("changes", "composites"),
    [
        ({}, 2),
        ({"num_samples": 100}, 0),  # too many rows of a tile without a sample
        ({"num_levels": 3, "use_viewdirs": False}, 3),
        ({"net_depth": 5, "use_viewdirs": False}, 0),  # heads that read the features
        ({"ray_shape": "cylinder", "disable_integration": True, "density_activation": "relu"}, 2),
        ({"separate_mlps": True, "min_deg_point": 1}, 2),
    ],
)
def test_a_model_renders_through_the_kernels_that_encode(
    changes: dict[str, Any], composites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels without features or samples in between, those of the reference; where that serves in every level."""
    called = []

    def composited(*inputs: Any) -> tuple[Tensor, ...]:
        called.append(inputs)
        return twin_composited(*inputs)

    def forward(*_: Any) -> Any:
        raise AssertionError("inference has made features in memory")

    model = fused_model(monkeypatch, TWINS._replace(composited_forward=composited), **changes)
    rays = some_rays()
    with torch.no_grad():
        if composites:  # where not, the density alone has no kernel that encodes
            take(TWINS._replace(composited_forward=composited, forward=forward), monkeypatch)
        given = model.render_rays(rays)
    assert len(called) == composites
    monkeypatch.undo()
    with torch.no_grad(), use_backend("reference"):
        wanted = model.render_rays(rays)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_with_gradients_features_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused_model(monkeypatch)
    assert not model.mlp.encodes and not model.mlp.composites(128)
    with torch.no_grad():
        assert model.mlp.encodes and model.mlp.composites(128) and not model.mlp.composites(100)


@pytest.mark.parametrize(
    ("samples", "serves"),
    [(1, True), (32, True), (60, True), (50, False), (100, False), (128, True), (129, False), (250, True)],
)
def test_which_rays_are_composited_in_the_kernel(samples: int, serves: bool) -> None:
    assert (why_not_composited(samples, Architecture(8, 1, 4), True) == "") is serves


def test_weights_are_packed_once_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []

    def pack(flat: Tensor, *_: Any) -> Tensor:
        packed.append(flat)
        return flat.clone()

    model, rays = fused_model(monkeypatch, TWINS._replace(pack=pack)), some_rays()

    def step() -> list[Tensor]:
        coarse, fine = model(rays)
        return list(torch.autograd.grad(coarse.rgb.sum() + fine.rgb.square().sum(), list(model.parameters())))

    wanted = step()
    assert len(packed) == 2  # once a level
    with keeping_weights(model):
        given = step()
        assert len(packed) == 3
        with keeping_weights(model):
            step()
        assert len(packed) == 3
    for one, other in zip(given, wanted, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        model.mlp.linears[0].weight.zero_()
    assert not torch.equal(step()[-1], wanted[-1])  # nothing of before is left


def test_a_picture_packs_its_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []

    def pack(flat: Tensor, *_: Any) -> Tensor:
        packed.append(flat)
        return flat.clone()

    model = fused_model(monkeypatch, TWINS._replace(pack=pack))
    render_image(model, some_rays(), chunk_rays=5)
    assert len(packed) == 2  # the density's, and the whole network's


# ---- through the emulated kernels


def stored(x: Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


class Emulated:
    """The operators by csrc/mlp in the CUDA emulation, with the sums split in three."""

    def kernels(self) -> Kernels:
        return TWINS._replace(forward=self.forward, backward=self.backward)

    def _run(
        self,
        features: Tensor,
        ray_bias: Tensor | None,
        flat: Tensor,
        samples_per_ray: int,
        sizes: Sizes,
        grads: dict[str, Tensor | None],
        to_features: bool,
    ) -> dict[str, np.ndarray]:
        count, columns = features.shape
        arrays = {"features": stored(features)}
        layers = twin_layers(flat, columns, sizes)
        for number, (weight, bias) in enumerate(layers):
            arrays |= {f"weight{number}": weight.numpy(), f"bias{number}": bias.numpy()}
        if ray_bias is not None:
            arrays["ray_bias"] = ray_bias.numpy()
            del arrays[f"bias{sizes.depth + 1}"]
        module = _native.load()
        assert module is not None
        per_tile, tiles = module.mlp_sizes(columns, *sizes), -(-count // 128)
        hidden = count * (sizes.width * sizes.depth + sizes.view_width * sizes.view_depth)
        of_type = arrays["features"].dtype
        outputs: dict[str, Any] = {
            "packed": ((per_tile["packed"],), np.uint8),
            "rgb": ((count, 3), np.float32),
            "density": ((count,), np.float32),
            "activations": ((hidden,), of_type),
            "masks": ((per_tile["masks"] // 4 * tiles,), np.uint32),
        }
        if grads:
            arrays |= {name: grad.numpy() for name, grad in grads.items() if grad is not None}
            outputs |= {
                "deltas": ((hidden + 8 * count,), of_type),
                "gradients": (flat.shape, np.float32),
                "workspace": ((3 * flat.numel(),), np.float32),
            }
            if to_features:
                outputs["grad_features"] = ((count, columns), np.float32)
            if sizes.view_depth:
                outputs["ray_sums"] = ((count // samples_per_ray, sizes.view_width), np.float32)
        scalars = {"features": columns, "samples": count, "samples_per_ray": samples_per_ray, "splits": 3}
        defines = program_of(sizes.width, str(features.dtype).removeprefix("torch."))
        return run("mlp", arrays, outputs, scalars | sizes._asdict(), checks=["memory"], defines=defines)

    def forward(
        self, features: Tensor, ray_bias: Tensor | None, packed: Tensor, samples_per_ray: int, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *numbers, _ = options
        out = self._run(features, ray_bias, packed, samples_per_ray, Sizes(*numbers), {}, False)
        rgb, density = torch.from_numpy(out["rgb"]), torch.from_numpy(out["density"])
        return rgb, density, features.new_empty(0) if ray_bias is None else ray_bias, features.new_empty(0)

    def backward(
        self,
        grad_rgb: Tensor | None,
        grad_density: Tensor | None,
        features: Tensor,
        packed: Tensor,
        activations: Tensor,
        masks: Tensor,
        samples_per_ray: int,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        *numbers, _, to_features = options
        sizes = Sizes(*numbers)
        ray_bias = activations if sizes.view_depth else None
        grads = {"grad_rgb": grad_rgb, "grad_density": grad_density}
        out = self._run(features, ray_bias, packed, samples_per_ray, sizes, grads, to_features)
        ray_sums = out.get("ray_sums", np.zeros((0, 0), np.float32))
        of_features = out.get("grad_features", np.zeros((0, features.shape[1]), np.float32))
        found = (out["gradients"], ray_sums, of_features)
        gradients, sums, grad_features = (torch.from_numpy(array) for array in found)
        return gradients, sums, grad_features


class EmulatedHopper(Emulated):
    """The same by the kernels of compute capability 9.0a."""

    def _run(
        self,
        features: Tensor,
        ray_bias: Tensor | None,
        flat: Tensor,
        samples_per_ray: int,
        sizes: Sizes,
        grads: dict[str, Tensor | None],
        to_features: bool,
    ) -> dict[str, np.ndarray]:
        count, columns = features.shape
        kind = "Bfloat16" if features.dtype == torch.bfloat16 else "Half"
        rays = count // samples_per_ray
        shape = test_mlp_hopper.Shape(
            features=columns, type=kind, rays=rays, samples_per_ray=samples_per_ray, **sizes._asdict()
        )
        network = test_mlp_hopper.Network(shape)
        network.parameters, network.features = flat.numpy(), stored(features)
        if ray_bias is not None:
            network.ray_bias = ray_bias.numpy()
        kept = test_mlp_hopper.forward(network)
        if not grads:
            return kept
        for name, grad in grads.items():
            setattr(network, name, None if grad is None else grad.numpy())
        deltas = test_mlp_hopper.dgrad(network, kept, to_features)
        return deltas | test_mlp_hopper.wgrad(network, kept, deltas, is_deterministic=True)


# Features, view features, width, depth, view width, view depth, skip; rays, samples of each.
MMA, HOPPER, BFLOAT16, HALF = Emulated(), EmulatedHopper(), torch.bfloat16, torch.float16
BESIDE_AUTOCAST = {
    "mma": (MMA, BFLOAT16, (96, 27, 64, 8, 32, 1, 4), (5, 29)),
    "mma, no view": (MMA, BFLOAT16, (48, None, 64, 4, 8, 1, 3), (5, 29)),
    "mma, width 128": (MMA, BFLOAT16, (30, 15, 128, 2, 64, 2, 4), (5, 29)),
    "mma, width 256": (MMA, BFLOAT16, (48, 27, 256, 2, 128, 1, 1), (3, 13)),
    "mma, half": (MMA, HALF, (96, 27, 64, 8, 32, 1, 4), (5, 29)),
    "Hopper": (HOPPER, BFLOAT16, (96, 27, 64, 8, 32, 1, 4), (5, 29)),
    "Hopper, half, width 128": (HOPPER, HALF, (30, 15, 128, 2, 64, 2, 1), (5, 29)),
    "Hopper, width 256": (HOPPER, BFLOAT16, (48, None, 256, 2, 16, 1, 4), (3, 13)),
}


@pytest.mark.parametrize(
    ("kernels", "operands", "shape", "rays"), BESIDE_AUTOCAST.values(), ids=BESIDE_AUTOCAST.keys()
)
def test_error_is_within_twice_that_of_autocast(
    kernels: Emulated,
    operands: torch.dtype,
    shape: tuple[Any, ...],
    rays: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs and gradients of everything, by the emulated kernels and by torch's autocast, against float64."""
    take(kernels.kernels(), monkeypatch)
    features, views, width, depth, view_width, view_depth, skip = shape
    torch.manual_seed(0)
    sizes = reference.mip_mlp_shapes(features, views, depth, width, view_depth, view_width, skip)
    linears = torch.nn.ModuleList(torch.nn.Linear(i, o) for i, o in sizes)
    inputs = [torch.rand(*rays, features) * 2 - 1]
    inputs += [] if views is None else [torch.rand(rays[0], views) * 2 - 1]
    architecture = Architecture(depth, view_depth, skip)

    def results(dtype: torch.dtype, autocast: bool, fused: bool) -> list[Tensor]:
        network = copy.deepcopy(linears).to(dtype)
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        parameters = [p for linear in network for p in linear.parameters()]
        directions = None if views is None else leaves[1]
        with torch.autocast("cpu", operands, enabled=autocast):
            if fused:
                outputs = fused_mlp(leaves[0], directions, parameters, architecture, operands)
            else:
                outputs = reference.mip_mlp(leaves[0], directions, network, *architecture)
        rgb, density = (output.to(dtype) for output in outputs)
        loss = torch.sigmoid(rgb).square().sum() + torch.nn.functional.softplus(density - 1).sum()
        grads = torch.autograd.grad(loss, [*leaves, *parameters])
        return [tensor.detach().double() for tensor in (rgb, density, *grads)]

    exact = results(torch.float64, False, False)
    for one, rounded, other in zip(
        exact, results(torch.float32, True, False), results(torch.float32, False, True), strict=True
    ):
        assert (other - one).norm() <= 2 * (rounded - one).norm()


def test_what_verify_calls_from_rays_to_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two sides are the same function, so that what they differ by on a GPU is the kernel's."""
    take(TWINS, monkeypatch)
    arrays = verification_mlp._ray_arrays(torch.Generator().manual_seed(1))
    arrays = {name: value.double() for name, value in arrays.items()}
    with use_backend("reference"):
        wanted = verification_mlp._from_rays(arrays, None)
    choice = MlpChoice("fused", torch.float64, "for a test")
    monkeypatch.setattr(MipMLP, "implementation", property(lambda _: choice))
    given = verification_mlp._from_rays(arrays, None)
    assert set(given) == set(wanted)
    for name, one in given.items():
        torch.testing.assert_close(one, wanted[name], rtol=1e-9, atol=1e-9)
    assert verification_mlp.MLP_CASES[0].served is not None
    assert verification_mlp.MLP_CASES[0].served(torch.device("cpu"), torch.float32, torch.bfloat16) is None
