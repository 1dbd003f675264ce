"""The network beside PyTorch's own: eager, bf16 autocast, torch.compile, and every engine of MipMLP that runs here.

python benchmarks/bench_mlp.py [--device cpu|cuda] [--threads 1 2] [--runs 20]
python benchmarks/bench_mlp.py --device cpu --large --threads 2 --runs 3 --allocators "page faults removed" --out FOLDER

Rows of the same case compute the same function of the same weights. Every row's error may be twice that of PyTorch's
layers in the precision of its products: float32, or bf16 autocast. `tcnn` is another architecture, with its own weights
and no error. What cannot run here has a row that says why.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Inputs, Outputs, main
from benchmarks.rows import BF16, no_products
from mipnerf_fast import reference
from mipnerf_fast.ops import MipMLP, MlpShape, choose_mlp

SAMPLES = 128
PAPER = MlpShape()
# Of the preset "small".
SMALL = MlpShape(72, 27, 3, 64, 1, 64, 4)
MODES = ("inference", "forward", "forward + backward")
# On a GPU torch.compile has its row at 2^19 samples: 4096 rays.
AUTOTUNED = 19
# On a CPU 2^17 samples are the fewest of a step on a GPU, and seconds a call.
LARGE_ON_CPU = 17


def relative_error(outputs: Outputs, truth: Outputs) -> float:
    """||got - want|| / ||want|| of the outputs together and of the gradients together, the larger; NaN if any is."""
    errors = []
    for kind in (False, True):
        names = [name for name in truth if name.startswith("grad ") is kind]
        if names:
            got, want = (
                torch.cat([x[name].detach().double().flatten() for name in names]) for x in (outputs, truth)
            )
            errors.append(float((got - want).norm() / want.norm()))
    return max(errors) if all(error == error for error in errors) else float("nan")


def multiply_adds(shape: MlpShape, folded: bool, backward: bool) -> int:
    """Of one sample: every layer as the paper writes it, or with the bottleneck folded in and the views per ray.

    A backward pass multiplies twice as often, but for the gradient to the features, which nobody asks for.
    """
    shapes = reference.mip_mlp_shapes(*shape)
    if not folded:
        total = sum(i * o for i, o in shapes)
        return 3 * total - shapes[0][0] * shapes[0][1] if backward else total
    depth, width, features = shape.net_depth, shape.net_width, shape.in_features
    if shape.view_features is None:
        kept = shapes
    else:
        # Of the view layer only what reads the trunk, whose width the bottleneck's input tells.
        kept = [*shapes[: depth + 1], (shapes[depth + 1][0], shapes[depth + 2][1]), *shapes[depth + 3 :]]
    total = sum(i * o for i, o in kept)
    to_features = shapes[0][0] * width + sum(features * o for i, o in kept[1:] if i == width + features)
    return 3 * total - to_features if backward else total


@functools.cache
def product_rate(device: torch.device) -> float:
    """Floating-point operations a second of a large product: 8192^3 in bf16 on a GPU, 2048^3 in float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def make_inputs(shape: MlpShape, rays: int) -> Callable[[int, torch.device], Inputs]:
    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def rand(*sizes: int) -> Tensor:
            return (2 * torch.rand(*sizes, generator=generator) - 1).to(device)

        return {
            "features": rand(rays, SAMPLES, shape.in_features),
            "viewdirs_enc": rand(rays, shape.view_features or 0),
            "to_rgb": rand(rays, SAMPLES, 3),
            "to_density": rand(rays, SAMPLES, 1),
        }

    return make


def in_mode(
    network: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], mlp: MipMLP, mode: str
) -> Callable[[Inputs], Outputs]:
    """A call as in rendering, a training pass without its backward half, or a whole one."""
    parameters = dict(mlp.named_parameters())

    def run(inputs: Inputs) -> Outputs:
        with torch.set_grad_enabled(mode != "inference"):
            rgb, density = network(inputs["features"], inputs["viewdirs_enc"])
        outputs = {"rgb": rgb, "density": density}
        if mode == "forward + backward":
            cotangents = [inputs["to_rgb"].to(rgb.dtype), inputs["to_density"].to(density.dtype)]
            grads = torch.autograd.grad((rgb, density), list(parameters.values()), cotangents)
            outputs |= {f"grad {name}": grad for name, grad in zip(parameters, grads, strict=True)}
        return outputs

    return run


def case(
    device: torch.device, shape: MlpShape, rays: int, mode: str, name: str, compiled: bool = True
) -> Case:
    torch.manual_seed(0)
    plain = MipMLP(*shape, backend="reference").to(device)

    def engine(backend: str, dtype: str, deterministic: bool) -> MipMLP:
        mlp = MipMLP(*shape, backend=backend, compute_dtype=dtype, deterministic=deterministic).to(device)
        mlp.load_state_dict(plain.state_dict())
        return mlp

    missing = no_products(device)
    halves_run = BF16 not in missing
    not_run = {} if halves_run else {"eager bf16 autocast": missing[BF16]}
    for label, backend, dtype in ENGINES:
        why = why_not(shape, device, backend, dtype)
        if why:
            not_run[label] = why

    def autocast(features: Tensor, viewdirs_enc: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            rgb, density = plain(features, viewdirs_enc)
            return rgb, density

    def tf32(features: Tensor, viewdirs_enc: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            rgb, density = plain(features, viewdirs_enc)
            return rgb, density
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def variants() -> dict[str, Callable[[Inputs], Outputs]]:
        found: dict[str, Callable[[Inputs], Outputs]] = {"eager fp32": in_mode(plain, plain, mode)}
        if device.type == "cuda":
            found["eager TF32"] = in_mode(tf32, plain, mode)
        if halves_run:
            found["eager bf16 autocast"] = in_mode(autocast, plain, mode)
        if compiled:
            half = device.type == "cuda"
            mode_of_compile = "max-autotune-no-cudagraphs" if half else None
            found["compile bf16" if half else "compile fp32"] = in_mode(
                torch.compile(autocast if half else plain, mode=mode_of_compile), plain, mode
            )
        for label, backend, dtype in ENGINES:
            atomic = label.endswith(ATOMIC)
            if label in not_run or (atomic and mode != MODES[2]):  # they differ in the backward pass alone
                continue
            tcnn = backend == "tcnn"
            mlp = (
                MipMLP(*another(shape), backend="tcnn").to(device)
                if tcnn
                else engine(backend, dtype, not atomic)
            )
            found[label] = in_mode(mlp, mlp, mode)
        return found

    def truth(inputs: Inputs) -> Outputs:
        exact = MipMLP(*shape, backend="reference").to(device)
        exact.load_state_dict(plain.state_dict())
        exact = exact.double()
        return in_mode(exact, exact, mode)({name: x.double() for name, x in inputs.items()})

    half_reference = in_mode(autocast, plain, mode)
    halves = [
        "eager bf16 autocast",
        "compile bf16",
        *[label for label, _, dtype in ENGINES if dtype == "bf16"],
    ]
    backward = mode == "forward + backward"
    samples = rays * SAMPLES
    parameters = sum(p.numel() for p in plain.parameters())
    return Case(
        name=f"{mode}, {name}, 2^{samples.bit_length() - 1} samples",
        make_inputs=make_inputs(shape, rays),
        variants=variants,
        truth=truth,
        reference=in_mode(plain, plain, mode),
        # Two orders of summation may decide a ReLU differently: one neuron of one sample, that share of the norm.
        floor=(samples * shape.net_width) ** -0.5 if backward else 8 * torch.finfo(torch.float32).eps,
        floor_why="one flipped ReLU, 1 / sqrt(samples x width)" if backward else "8 ulps of float32",
        moved_bytes=4 * (samples * (shape.in_features + 4) * (2 if backward else 1) + 2 * parameters),
        flops=2 * samples * multiply_adds(shape, False, backward),
        # TF32 keeps as few digits more than bf16's 8 as its 11.
        references=dict.fromkeys([*halves, "eager TF32"], half_reference) if halves_run else {},
        error=relative_error,
        folded_flops=2 * samples * multiply_adds(shape, True, backward),
        product_flops=product_rate(device),
        unchecked={"tcnn": "another architecture: fp16, no biases, no skips, at most 128 wide"},
        not_run=not_run,
        large=device.type == "cpu" and samples >= 1 << LARGE_ON_CPU,
    )


ATOMIC = ", atomic sums"
ENGINES = (
    ("folded fp32", "folded", "fp32"),
    ("folded bf16", "folded", "bf16"),
    ("cublaslt bf16", "cublaslt", "bf16"),
    ("fused bf16", "fused", "bf16"),
    (f"fused bf16{ATOMIC}", "fused", "bf16"),
    ("tcnn", "tcnn", "fp16"),
)


def another(shape: MlpShape) -> MlpShape:
    """The nearest that tiny-cuda-nn can express: layers of at most 128 columns, no skip."""
    width, view_width = min(shape.net_width, 128), min(shape.net_width_condition, 128)
    return shape._replace(net_width=width, net_width_condition=view_width, skip_layer=shape.net_depth)


def why_not(shape: MlpShape, device: torch.device, backend: str, dtype: str) -> str:
    """Why an engine cannot run here; empty where it can."""
    if backend == "tcnn":
        if importlib.util.find_spec("tinycudann") is None:
            return "tiny-cuda-nn is not installed"
        return "" if device.type == "cuda" else "tiny-cuda-nn needs a GPU"
    try:
        choose_mlp(shape, device, torch.float32, backend, dtype)
    except RuntimeError as error:
        return str(error).partition(", but ")[2]
    return ""


def cases(device: torch.device) -> Sequence[Case]:
    """2^14 to 2^20 samples on a GPU, 2^8 to 2^14 on a CPU, and 2^17 where large cases are asked for."""
    sizes: list[tuple[MlpShape, str, int, tuple[str, ...], bool]]
    if device.type == "cuda":
        # max-autotune takes minutes for each size: at the paper's 4096 rays alone, after all others.
        sizes = [
            (PAPER, "8 x 256", exponent, MODES, exponent == AUTOTUNED)
            for exponent in (14, 17, 18, 20, AUTOTUNED)
        ]
    else:
        ends = MODES[0], MODES[2]
        sizes = [
            (PAPER, "8 x 256", 8, ends, False),
            (PAPER, "8 x 256", 10, ends, False),
            (PAPER, "8 x 256", 12, MODES, True),
            (PAPER, "8 x 256", 14, ends, False),
            (PAPER, "8 x 256", LARGE_ON_CPU, ends, False),
            (SMALL, "3 x 64", 8, ends, False),
            (SMALL, "3 x 64", 10, ends, False),
            (SMALL, "3 x 64", 12, MODES, False),
            (SMALL, "3 x 64", 14, ends, False),
        ]
    return [
        case(device, shape, (1 << exponent) // SAMPLES, mode, name, compiled and mode != MODES[1])
        for shape, name, exponent, modes, compiled in sizes
        for mode in modes
    ]


if __name__ == "__main__":
    main(
        "mlp",
        cases,
        __doc__ or "",
        error="||got - want|| / ||want||, of the outputs or of all gradients, the larger,",
        notes="`of the first` is the share of eager float32's peak. "
        "GFLOP/s counts the layers as the paper writes them for every row, "
        "the column beside it what the folded network needs; `of product` are both over a large matrix product "
        "measured here (2048^3 in float32 on a CPU, 8192^3 in bf16 on a GPU).",
    )
