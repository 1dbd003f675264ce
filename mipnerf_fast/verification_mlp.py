"""What `verify` calls of the network: every engine that runs on a device, in every dtype of its operands."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import ops
from .backend import current_backend
from .reference import Activations
from .verification_case import Case, Tensors

# A skip after two layers, two view layers, and about as many samples as the other operations have.
_SHAPE = ops.MlpShape(48, 9, 4, 64, 2, 32, 2)
_RAYS, _SAMPLES, _COMPOSITED = 96, 65, 64
_OPERANDS = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_HALVES = (torch.bfloat16, torch.float16)


def _arrays(generator: torch.Generator) -> Tensors:
    """Encodings, and the network's parameters with random biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        parameters = dict(ops.MipMLP(*_SHAPE, backend="reference").named_parameters())
    arrays = {
        "features": 2 * torch.rand(_RAYS, _SAMPLES, _SHAPE.in_features, generator=generator) - 1,
        "viewdirs_enc": 2 * torch.rand(_RAYS, _SHAPE.view_features or 0, generator=generator) - 1,
    }
    for name, parameter in parameters.items():
        bias = name.endswith("bias")
        arrays[name] = torch.rand(parameter.shape, generator=generator) - 0.5 if bias else parameter.detach()
    return {name: value.double() for name, value in arrays.items()}


def _served(backend: str) -> Callable[[torch.device, torch.dtype, torch.dtype | None], str | None]:
    def served(device: torch.device, dtype: torch.dtype, out: torch.dtype | None) -> str | None:
        try:
            return ops.choose_mlp(_SHAPE, device, dtype, backend, _OPERANDS[out]).why
        except RuntimeError:
            return None

    return served


def _case(backend: str, *out_dtypes: torch.dtype | None, name: str = "", deterministic: bool = True) -> Case:
    """An engine whose operands have the dtype asked for; the reference then runs under autocast."""

    def run(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
        features, plain = a["features"], current_backend() == "reference"
        engine = "reference" if plain else backend
        mlp = ops.MipMLP(
            *_SHAPE, backend=engine, compute_dtype=_OPERANDS[out_dtype], deterministic=deterministic
        )
        parameters = {name: value for name, value in a.items() if name.startswith("linears.")}
        with torch.autocast(
            features.device.type, out_dtype, enabled=plain and out_dtype is not None, cache_enabled=False
        ):
            rgb, density = torch.func.functional_call(
                mlp.to(features), parameters, (features, a["viewdirs_enc"])
            )
        return {"rgb": rgb, "density": density}

    inputs = tuple(_arrays(torch.Generator()))
    return Case(
        "mlp",
        name or backend,
        inputs,
        run,
        out_dtypes=out_dtypes,
        in_dtypes=(torch.float32,),
        make=_arrays,
        unit="row",
        served=_served(backend),
    )


_ENCODING = ops.Encoding(0, _SHAPE.in_features // 6)
_ACTIVATIONS: Activations = {
    "density_activation": "softplus",
    "density_bias": -1.0,
    "rgb_activation": "sigmoid",
    "rgb_padding": 0.001,
}


def _ray_arrays(generator: torch.Generator) -> Tensors:
    """Rays in place of the encodings, of as many samples as the kernels composite."""
    arrays = _arrays(generator)
    del arrays["features"]
    t_vals = torch.sort(2 + 4 * torch.rand(_RAYS, _COMPOSITED + 1, generator=generator), -1).values
    rays = {
        "t_vals": t_vals,
        "origins": torch.rand(_RAYS, 3, generator=generator),
        "directions": torch.rand(_RAYS, 3, generator=generator) + 0.5,
        "radii": torch.full((_RAYS, 1), 0.01),
    }
    return rays | arrays


def _from_rays(a: Tensors, out_dtype: torch.dtype | None) -> Tensors:
    """Encoding, network and compositing: in the fused kernel, or one after the other."""
    frusta = ops.Frusta(a["t_vals"], a["origins"], a["directions"], a["radii"])
    plain = current_backend() == "reference"
    mlp = ops.MipMLP(
        *_SHAPE, backend="reference" if plain else "fused", compute_dtype=_OPERANDS[out_dtype]
    ).to(a["t_vals"])
    mlp.load_state_dict({name: value for name, value in a.items() if name.startswith("linears.")})
    with torch.no_grad():
        if not plain:
            level = mlp.composited(frusta, _ENCODING, a["viewdirs_enc"], True, _ACTIVATIONS)
            return level._asdict()
        features = ops.frustum_ipe(*frusta, _ENCODING.min_deg, _ENCODING.max_deg)
        with torch.autocast(
            features.device.type, out_dtype, enabled=out_dtype is not None, cache_enabled=False
        ):
            rgb, density = mlp(features, a["viewdirs_enc"])
        raw = (rgb.to(a["t_vals"]), density.to(a["t_vals"]))
        return ops.composite(*raw, a["t_vals"], a["directions"], True, **_ACTIVATIONS)._asdict()


MLP_CASES = (
    Case(
        "mlp",
        "fused, rays to pixels",
        tuple(_ray_arrays(torch.Generator())),
        _from_rays,
        differentiable=False,
        out_dtypes=_HALVES,
        in_dtypes=(torch.float32,),
        make=_ray_arrays,
        served=_served("fused"),
    ),
    _case("folded", None, torch.bfloat16),
    _case("emulated", *_HALVES),
    _case("cublaslt", *_HALVES),
    _case("fused", *_HALVES),
    _case("fused", *_HALVES, name="fused, gradients summed as they come", deterministic=False),
)
