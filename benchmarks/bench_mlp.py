"""The network beside PyTorch's own: eager, bf16 autocast, torch.compile, and every engine of MipMLP that runs here.

python benchmarks/bench_mlp.py [--device cpu|cuda] [--threads 1 2] [--runs 20]
python benchmarks/bench_mlp.py --device cpu --large --threads 2 --runs 3 --allocators "page faults removed" --out FOLDER
python benchmarks/bench_mlp.py --device cuda --only 2^14 --compile-sizes 14 --out FOLDER

Rows of the same case compute the same function of the same weights. Every row's error may be twice that of PyTorch's
layers in the precision of its products: float32, TF32, or bf16 autocast. `tcnn` is another architecture, with its own
weights and no error. What cannot run here has a row that says why.

torch.compile has a row of max-autotune without CUDA graphs, which no other row has either: bf16 autocast on a GPU,
float32 on a CPU. On a GPU it takes minutes for each size, so that only those of --compile-sizes are compiled (2^19 on a
GPU, 2^12 on a CPU if nothing is said). Where time is short, --only measures one of them by itself.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Inputs, Outputs, main
from benchmarks.rows import (
    BF16,
    FP32,
    TF32,
    folded_multiply_adds,
    multiply_adds,
    no_products,
    product_rates,
    product_size,
    tensor_float,
)
from mipnerf_fast.ops import MipMLP, MlpShape
from mipnerf_fast.ops.mlp_backends import MLP_DTYPES, why_not
from mipnerf_fast.ops.mlp_tcnn import why_not_tcnn

SAMPLES = 128
PAPER = MlpShape()
# Of the preset "small".
SMALL = MlpShape(72, 27, 3, 64, 1, 64, 4)
MODES = ("inference", "forward", "forward + backward")
# torch.compile's size where none is asked for; on a GPU that of 4096 rays.
AUTOTUNED = {"cuda": 19, "cpu": 12}
COMPILE_MODE = "max-autotune-no-cudagraphs"
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


def flops(shape: MlpShape, backward: bool) -> tuple[int, int]:
    """Of one sample: as the paper writes the network, and with the bottleneck folded in and the views per ray."""
    counts = multiply_adds(shape), folded_multiply_adds(shape)
    written, folded = (
        2 * (2 * forward + to_inputs if backward else forward) for forward, to_inputs in counts
    )
    return written, folded


@functools.cache
def _product_rates(device: torch.device, threads: int) -> dict[str, float]:
    return product_rates(device, product_size(device))


def product_rate(device: torch.device, variant: str) -> float:
    """FLOP/s of the large product that a row is held against, with the threads in force.

    On a GPU that of bf16 for every row, on a CPU that of the row's own operands.
    """
    operands = BF16 if device.type == "cuda" or BF16 in variant else FP32
    return _product_rates(device, torch.get_num_threads())[operands]


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


def in_tf32(run: Callable[[Inputs], Outputs]) -> Callable[[Inputs], Outputs]:
    """The same with float32 products in TF32, those of the backward pass too."""

    def rounded(inputs: Inputs) -> Outputs:
        with tensor_float(True):
            return run(inputs)

    return rounded


def compile_label(device: torch.device) -> str:
    """Of torch.compile's row, with its mode and operands."""
    return f"compile max-autotune {BF16 if device.type == 'cuda' else FP32}"


def case(
    device: torch.device, shape: MlpShape, rays: int, mode: str, name: str, compiled: bool = True
) -> Case:
    torch.manual_seed(0)
    plain = MipMLP(*shape, backend="reference").to(device)

    def engine(backend: str, dtype: str, deterministic: bool) -> MipMLP:
        mlp = MipMLP(*shape, backend=backend, compute_dtype=dtype, deterministic=deterministic).to(device)
        mlp.load_state_dict(plain.state_dict())
        return mlp

    missing, compile_row = no_products(device), compile_label(device)
    eager = {"eager TF32": TF32, "eager bf16 autocast": BF16}
    not_run = {label: missing[operands] for label, operands in eager.items() if operands in missing}
    if not compiled:
        is_forward = mode == MODES[1]
        not_run[compile_row] = (
            "compiled in the other modes alone"
            if is_forward
            else "compiled only for the sizes of --compile-sizes"
        )
    for label, backend, dtype in ENGINES:
        why = why_no_engine(shape, device, backend, dtype)
        if why:
            not_run[label] = why

    def autocast(features: Tensor, viewdirs_enc: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            rgb, density = plain(features, viewdirs_enc)
            return rgb, density

    def variants() -> dict[str, Callable[[Inputs], Outputs]]:
        found: dict[str, Callable[[Inputs], Outputs]] = {"eager fp32": in_mode(plain, plain, mode)}
        if "eager TF32" not in not_run:
            found["eager TF32"] = tf32_reference
        if "eager bf16 autocast" not in not_run:
            found["eager bf16 autocast"] = half_reference
        if compiled:
            # What other cases have compiled counts against the limit of recompilations.
            torch.compiler.reset()
            network = autocast if BF16 in compile_row else plain
            found[compile_row] = in_mode(
                torch.compile(network, mode=COMPILE_MODE, fullgraph=True, dynamic=False), plain, mode
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
    # TF32 keeps 11 binary digits of a factor and bf16 only 8, whose bound would be eight times too wide for it.
    tf32_reference = in_tf32(in_mode(plain, plain, mode))
    references = {
        "eager TF32": tf32_reference,
        "eager bf16 autocast": half_reference,
        **({compile_row: half_reference} if BF16 in compile_row else {}),
        **{label: half_reference for label, _, dtype in ENGINES if dtype == BF16},
    }
    backward = mode == "forward + backward"
    samples = rays * SAMPLES
    written, folded = flops(shape, backward)
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
        flops=samples * written,
        references={label: run for label, run in references.items() if label not in not_run},
        error=relative_error,
        folded_flops=samples * folded,
        product_flops=functools.partial(product_rate, device),
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


def why_no_engine(shape: MlpShape, device: torch.device, backend: str, dtype: str) -> str:
    """Why an engine cannot run here; empty where it can."""
    if backend == "tcnn":
        return why_not_tcnn(another(shape), device)
    operands = MLP_DTYPES[dtype]
    assert operands is not None, f"{backend} is measured with operands that are named, not {dtype}"
    return why_not(backend, shape, device, torch.float32, operands)


def cases(device: torch.device, compile_sizes: Sequence[int] | None = None) -> Sequence[Case]:
    """2^14 to 2^20 samples on a GPU, 2^8 to 2^14 on a CPU, and 2^17 where large cases are asked for.

    Args:
        device: of all.
        compile_sizes: exponents of the sizes with a time of torch.compile; that of AUTOTUNED by default.

    Errors: SystemExit, naming those that no case has.
    """
    sizes: list[tuple[MlpShape, str, int, tuple[str, ...]]]
    on_cuda = device.type == "cuda"
    chosen = (AUTOTUNED["cuda" if on_cuda else "cpu"],) if compile_sizes is None else tuple(compile_sizes)
    if on_cuda:
        # What takes minutes comes after all others.
        exponents = sorted((14, 17, 18, 19, 20), key=lambda exponent: exponent in chosen)
        sizes = [(PAPER, "8 x 256", exponent, MODES) for exponent in exponents]
    else:
        ends = MODES[0], MODES[2]
        sizes = [
            (PAPER, "8 x 256", 8, ends),
            (PAPER, "8 x 256", 10, ends),
            (PAPER, "8 x 256", 12, MODES),
            (PAPER, "8 x 256", 14, ends),
            (PAPER, "8 x 256", LARGE_ON_CPU, ends),
            (SMALL, "3 x 64", 8, ends),
            (SMALL, "3 x 64", 10, ends),
            (SMALL, "3 x 64", 12, MODES),
            (SMALL, "3 x 64", 14, ends),
        ]
    known = sorted({exponent for _, _, exponent, _ in sizes})
    if unknown := [exponent for exponent in chosen if exponent not in known]:
        raise SystemExit(f"--compile-sizes {unknown}: expected some of {known}, the exponents of two")
    return [
        case(device, shape, (1 << exponent) // SAMPLES, mode, name, exponent in chosen and mode != MODES[1])
        for shape, name, exponent, modes in sizes
        for mode in modes
    ]


if __name__ == "__main__":
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--compile-sizes",
        type=int,
        nargs="*",
        help="exponents of the sizes that torch.compile is measured at "
        f"(default: {AUTOTUNED['cuda']} on a GPU, {AUTOTUNED['cpu']} on a CPU)",
    )
    main(
        "mlp",
        functools.partial(cases, compile_sizes=options.parse_known_args()[0].compile_sizes),
        __doc__ or "",
        error="||got - want|| / ||want||, of the outputs or of all gradients, the larger,",
        notes="`of the first` is the share of eager float32's peak. "
        "GFLOP/s counts the layers as the paper writes them for every row, "
        "the column beside it what the folded network needs; `of product` are both over a large matrix product "
        "measured here with as many threads: on a CPU 2048^3, in bf16 for the rows of bf16 and in float32 for the "
        "others, on a GPU 8192^3 in bf16 for every row. `compile max-autotune` is torch.compile without CUDA graphs.",
        parents=[options],
    )
