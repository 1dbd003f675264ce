"""The module `MipMLP`: the network's parameters and its forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import reference
from ..backend import current_backend
from ..reference import Activations, Composite
from .arguments import check_float, require
from .finite import reports_non_finite
from .keeping import KeepsWeights
from .mlp_autograd import Architecture
from .mlp_backends import MLP_BACKENDS, MLP_DTYPES, MlpChoice, MlpShape, choose_mlp
from .mlp_folded import CUBLASLT, TORCH, TWIN, folded_mlp
from .mlp_fused import (
    Encoding,
    Frusta,
    fused_mlp,
    fused_mlp_composited,
    fused_mlp_encoded,
    why_not_composited,
)
from .mlp_tcnn import WHAT, TcnnNetworks

_PRODUCTS = {"folded": TORCH, "emulated": TWIN, "cublaslt": CUBLASLT}


class MipMLP(KeepsWeights):
    """The mip-NeRF network: 8 x 256 with a skip, a linear bottleneck and a view branch (612,740 parameters).

    The function is `mipnerf_fast.reference.mip_mlp` over `linears`: the trunk layers, density, bottleneck, view layers
    and rgb. Weights start Glorot-uniform, biases at zero, as in the original. Parameters are the float32 master copy on
    every backend; 16-bit operands are rounded from them in every call, so that a checkpoint moves freely.

    Args:
        in_features: of the encoded position (96 for degrees 0 to 16).
        view_features: of the encoded view direction (27 for 4 octaves), or None without view directions.
        net_depth, net_width, net_depth_condition, net_width_condition, skip_layer: of the architecture.
        backend: "reference": the layers one by one, as the paper writes them. "folded": the bottleneck folded into the
            view layer, torch's products in place, in float32 (or bfloat16 where a CPU has the instructions).
            "cublaslt": the same with cuBLASLt's epilogues, bfloat16 or float16 operands, float32 sums. "fused": one
            kernel, likewise. "emulated": the arithmetic of cublaslt on the CPU, slow, for checks. "tcnn": networks of
            tiny-cuda-nn, ANOTHER ARCHITECTURE with other parameters: see `ops.mlp_tcnn`. "auto": the fastest of
            fused, cublaslt and folded that serves (on GPUs of capability 8.x cublaslt goes first); `implementation`
            says which and why.
        compute_dtype: of the operands, "bf16", "fp16", "fp32"; "auto": float32 on a CPU, bfloat16 on a GPU.
        deterministic: of "fused", which alone has the choice: gradients are summed in a fixed order, the same in every
            run. Without, blocks add theirs to memory as they come, unless torch.use_deterministic_algorithms is on;
            which is faster no GPU has measured.

    Errors: ValueError for an unknown backend or compute_dtype, and for a network that tcnn cannot express;
    RuntimeError where tiny-cuda-nn is missing.

    Example:
        >>> mlp = MipMLP(net_depth=3, net_width=64)
        >>> rgb, density = mlp(torch.rand(4, 8, 96), torch.rand(4, 27))
        >>> rgb.shape, density.shape
        (torch.Size([4, 8, 3]), torch.Size([4, 8, 1]))

    Source: algorithm 1.5; Barron et al. 2021, section 4; performance 1.2 for the folding.
    """

    def __init__(
        self,
        in_features: int = 96,
        view_features: int | None = 27,
        net_depth: int = 8,
        net_width: int = 256,
        net_depth_condition: int = 1,
        net_width_condition: int = 128,
        skip_layer: int = 4,
        *,
        backend: str = "auto",
        compute_dtype: str = "auto",
        deterministic: bool = True,
    ) -> None:
        super().__init__()
        require(backend in MLP_BACKENDS, "mlp", "backend", f"one of {', '.join(MLP_BACKENDS)}", repr(backend))
        require(
            compute_dtype in MLP_DTYPES,
            "mlp",
            "compute_dtype",
            f"one of {', '.join(MLP_DTYPES)}",
            repr(compute_dtype),
        )
        self.backend, self.compute_dtype, self.deterministic = backend, compute_dtype, deterministic
        self.net_depth, self.net_depth_condition, self.skip_layer = net_depth, net_depth_condition, skip_layer
        self.shape = MlpShape(
            in_features,
            view_features,
            net_depth,
            net_width,
            net_depth_condition,
            net_width_condition,
            skip_layer,
        )
        self.tcnn = TcnnNetworks(self.shape, compute_dtype) if backend == "tcnn" else None
        shapes = [] if backend == "tcnn" else reference.mip_mlp_shapes(*self.shape)
        self.linears = nn.ModuleList(nn.Linear(i, o) for i, o in shapes)
        for linear in self.linears:
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    @property
    def implementation(self) -> MlpChoice:
        """What computes this network where its parameters are now, and why.

        Errors: RuntimeError where its backend cannot serve them.
        """
        if self.tcnn is not None:
            if current_backend() == "reference":
                raise RuntimeError(f"mlp: the backend is set to reference, and there is none of {WHAT}")
            return MlpChoice("tcnn", torch.float16, WHAT)
        weight = self._weight()
        return choose_mlp(self.shape, weight.device, weight.dtype, self.backend, self.compute_dtype)

    @property
    def feature_dtype(self) -> torch.dtype | None:
        """The 16-bit dtype that the features are rounded to, so that an encoder can write it; None: their own."""
        choice = self.implementation
        short = choice.engine not in ("reference", "tcnn") and choice.dtype in (torch.bfloat16, torch.float16)
        return choice.dtype if short else None

    @reports_non_finite("mlp", "rgb", "density")
    def forward(self, features: Tensor, viewdirs_enc: Tensor | None) -> tuple[Tensor, Tensor]:
        """Raw rgb [B, N, 3] and raw density [B, N, 1] from features [B, N, F] and encoded directions [B, V].

        Errors: ValueError for a shape, dtype or device that does not fit, naming the argument; RuntimeError where the
        backend cannot serve, and for a second derivative (but the reference's).
        """
        self._check(features, viewdirs_enc)
        choice = self.implementation
        if self.tcnn is not None:
            rgb, density = self.tcnn(features, viewdirs_enc)
            return rgb, density
        if choice.engine == "reference":
            return reference.mip_mlp(
                features,
                viewdirs_enc,
                self.linears,
                self.net_depth,
                self.net_depth_condition,
                self.skip_layer,
            )
        return self._compute(choice, features, viewdirs_enc, *self._network())

    @property
    def encodes(self) -> bool:
        """Whether, as things are now, `encoded` and `composited` serve: in the fused kernels, without gradients.

        Not under torch.compile, which takes the operators that stand for forward and backward.
        """
        if self.tcnn is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return self.implementation.engine == "fused"

    def composites(self, samples: int, density_alone: bool = False) -> bool:
        """Whether `composited` serves rays of so many samples."""
        if not self.encodes:
            return False
        view_depth = 0 if density_alone else self.net_depth_condition
        architecture = Architecture(self.net_depth, view_depth, self.skip_layer)
        has_views = self.shape.view_features is not None and not density_alone
        return not why_not_composited(samples, architecture, has_views)

    @reports_non_finite("mlp", "rgb", "density")
    def encoded(
        self, frusta: Frusta, encoding: Encoding, viewdirs_enc: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The forward pass from rays, where `encodes`: the features are made in the network's kernel.

        Rounded otherwise than `frustum_ipe` and forward: the features are not float32 in between.

        Args: as of `ops.frustum_ipe` and of the forward pass.

        Returns: raw rgb [B, N, 3] and raw density [B, N, 1]; not differentiable.
        """
        parameters, architecture = self._network()
        dtype = self.implementation.dtype
        return fused_mlp_encoded(
            frusta, encoding, viewdirs_enc, parameters, architecture, dtype, kept=self._kept
        )

    @reports_non_finite("mlp", "level")
    def composited(
        self,
        frusta: Frusta,
        encoding: Encoding,
        viewdirs_enc: Tensor | None,
        white_background: bool,
        activations: Activations,
        density_alone: bool = False,
    ) -> Composite:
        """The forward pass from rays to pixels, where `composites`: one kernel, samples leave nothing but weights.

        Args:
            frusta, encoding, viewdirs_enc: as of `encoded`.
            white_background, activations: as of `ops.composite`.
            density_alone: whether nobody asks for colours (then without meaning), which spares the colour branch.

        Returns: Composite of rgb [B, 3], distance [B], acc [B], weights [B, N]; not differentiable.
        """
        parameters, architecture = self._network(density_alone)
        return fused_mlp_composited(
            frusta,
            encoding,
            None if density_alone else viewdirs_enc,
            parameters,
            architecture,
            self.implementation.dtype,
            white_background=white_background,
            kept=self._kept,
            **activations,
        )

    def _network(self, density_alone: bool = False) -> tuple[list[Tensor], Architecture]:
        """Parameters and architecture as the engines take them.

        Of the density alone: the same trunk under a colour that is no function of the direction, and nothing: three
        rows of zeros.
        """
        layers = self.linears[: self.net_depth + 1] if density_alone else self.linears
        parameters = [p for linear in layers for p in (linear.weight, linear.bias) if isinstance(p, Tensor)]
        if not density_alone:
            return parameters, Architecture(self.net_depth, self.net_depth_condition, self.skip_layer)
        columns = parameters[-2].shape[1]
        parameters += [parameters[-2].new_zeros(size) for size in ((3, columns), (3,))]
        return parameters, Architecture(self.net_depth, 0, self.skip_layer)

    def _weight(self) -> Tensor:
        # Of the first layer: going through all parameters takes as long as a small product.
        weight = next(self.parameters()) if self.tcnn is not None else self.linears[0].weight
        assert isinstance(weight, Tensor)
        return weight

    def _check(self, features: Tensor, viewdirs_enc: Tensor | None) -> None:
        device = self._weight().device
        columns, views = self.shape.in_features, self.shape.view_features
        if features.dim() != 3 or features.shape[-1] != columns:
            require(False, "mlp", "features", f"of shape [B, N, {columns}]", list(features.shape))
        check_float("mlp", "features", features)
        require(
            features.device == device, "mlp", "features", f"on {device} as the parameters", features.device
        )
        if views is None:
            require(
                viewdirs_enc is None, "mlp", "viewdirs_enc", "None for a network without views", "a tensor"
            )
            return
        if viewdirs_enc is None or tuple(viewdirs_enc.shape) != (features.shape[0], views):
            got = None if viewdirs_enc is None else list(viewdirs_enc.shape)
            wanted = f"of shape [{features.shape[0]}, {views}] ([B, V])"
            require(False, "mlp", "viewdirs_enc", wanted, got)
            raise AssertionError  # for the type checker: require has raised
        check_float("mlp", "viewdirs_enc", viewdirs_enc)
        require(
            viewdirs_enc.device == device,
            "mlp",
            "viewdirs_enc",
            f"on {device} as the parameters",
            viewdirs_enc.device,
        )

    @reports_non_finite("mlp", "density")
    def density(self, features: Tensor) -> Tensor:
        """Raw density [B, N, 1] alone, that of the forward pass, without the cost of the colour branch.

        Bit by bit the same wherever density is a product of its own, as in all engines but fused (there not tried).

        Errors: as of the forward pass.
        """
        choice, depth, views = self.implementation, self.net_depth, self.shape.view_features
        if self.tcnn is not None:
            # Its networks are fused: there is nothing to leave out.
            directions = None if views is None else features.new_zeros(features.shape[0], views)
            alone: Tensor = self.tcnn(features, directions)[1]
            return alone
        if choice.engine == "reference":
            return reference.mip_mlp_density(features, self.linears, depth, self.skip_layer)
        return self._compute(choice, features, None, *self._network(density_alone=True))[1]

    def _compute(
        self,
        choice: MlpChoice,
        features: Tensor,
        viewdirs_enc: Tensor | None,
        parameters: Sequence[Tensor],
        architecture: Architecture,
    ) -> tuple[Tensor, Tensor]:
        """Raw rgb and raw density from an engine that takes parameters, not layers."""
        inputs = (features, viewdirs_enc, parameters, architecture)
        if choice.engine == "fused":
            return fused_mlp(*inputs, choice.dtype, deterministic=self.deterministic, kept=self._kept)
        return folded_mlp(*inputs, _PRODUCTS[choice.engine], choice.dtype)
