"""Configurations as frozen dataclasses, and the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import InputError

# As `ops.MLP_BACKENDS` and `ops.MLP_DTYPES`, which need torch.
MlpBackend = Literal["auto", "reference", "folded", "cublaslt", "fused", "tcnn", "emulated"]
MlpDtype = Literal["auto", "bf16", "fp16", "fp32"]
FastMlpDtype = Literal["auto", "fp32", "tf32"]


@dataclass(frozen=True)
class MipNerfConfig:
    """The mip-NeRF model; the defaults are the paper's."""

    num_samples: int = 128
    """Intervals per ray and level (paper, section 4)."""
    num_levels: int = 2
    """Levels of sampling: one coarse, the rest resampled (section 3.2)."""
    min_deg_point: int = 0
    """First octave of the integrated positional encoding (equation 14)."""
    max_deg_point: int = 16
    """End of the octaves, excluded (section 4)."""
    deg_view: int = 4
    """Octaves of the view-direction encoding."""
    net_depth: int = 8
    """Trunk layers."""
    net_width: int = 256
    """Neurons per trunk layer."""
    net_depth_condition: int = 1
    """Layers of the view branch."""
    net_width_condition: int = 128
    """Neurons per layer of the view branch."""
    skip_layer: int = 4
    """The encoding is concatenated again after every layer index > 0 that this divides."""
    ray_shape: Literal["cone", "cylinder"] = "cone"
    """Shape of the volume behind a pixel; cylinder for NDC rays (section 3.1 and appendix)."""
    lindisp: bool = False
    """Coarse samples evenly in disparity instead of distance."""
    resample_padding: float = 0.01
    """Added to the blurred weights before resampling (equation 18, alpha)."""
    stop_level_grad: bool = True
    """No gradient through the resampled fenceposts. Only True is defined by the paper."""
    density_activation: Literal["softplus", "relu"] = "softplus"
    """From raw output to density (section 4)."""
    density_noise: float = 0.0
    """Standard deviation of the noise added to the raw density in training."""
    density_bias: float = -1.0
    """Added to the raw density before the activation: softplus(x - 1)."""
    rgb_padding: float = 0.001
    """The sigmoid is widened by this at both ends, so that 0 and 1 are reachable."""
    disable_integration: bool = False
    """Encode the mean alone: the ablation "no-ipe"."""
    use_viewdirs: bool = True
    """Colour depends on the view direction."""
    separate_mlps: bool = False
    """One MLP per level instead of one for all: the ablation "separate-mlps"."""
    mlp_backend: MlpBackend = "auto"
    """What computes the network; all but tcnn, which is another architecture, share their weights. See `MipMLP`."""
    mlp_dtype: MlpDtype = "auto"
    """Of the operands of the network's products; auto: fp32 on a CPU, bf16 on a GPU. Weights stay float32."""
    mlp_deterministic: bool = True
    """The fused kernels sum gradients in a fixed order; without, as they come, unless the run is deterministic."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            1,
            "num_samples",
            "num_levels",
            "net_depth",
            "net_width",
            "net_width_condition",
            "skip_layer",
        )
        _at_least(
            self, 0, "min_deg_point", "deg_view", "net_depth_condition", "resample_padding", "density_noise"
        )
        if self.max_deg_point <= self.min_deg_point:
            raise InputError(
                f"MipNerfConfig.max_deg_point: must exceed min_deg_point = {self.min_deg_point}, "
                f"got {self.max_deg_point}"
            )
        _one_of(self, "ray_shape", "cone", "cylinder")
        _one_of(self, "density_activation", "softplus", "relu")
        _one_of(self, "mlp_backend", *get_args(MlpBackend))
        _one_of(self, "mlp_dtype", *get_args(MlpDtype))
        if not self.stop_level_grad:
            raise InputError(
                "MipNerfConfig.stop_level_grad: only True is supported (resampling has no gradient)"
            )


@dataclass(frozen=True)
class NerfConfig:
    """The comparison system: NeRF with point samples and two networks (algorithm 1.13)."""

    num_coarse: int = 64
    """Coarse points per ray."""
    num_fine: int = 128
    """Points drawn from the coarse weights; the fine network sees them and the coarse ones."""
    max_deg_point: int = 10
    """Octaves of the positional encoding."""
    deg_view: int = 4
    """Octaves of the view-direction encoding."""
    net_depth: int = 8
    """Trunk layers."""
    net_width: int = 256
    """Neurons per trunk layer."""
    net_width_condition: int = 128
    """Neurons of the view layer."""
    skip_layer: int = 4
    """The encoding is concatenated again after every layer index > 0 that this divides."""
    lindisp: bool = False
    """Coarse points evenly in disparity instead of distance."""

    def __post_init__(self) -> None:
        _at_least(self, 3, "num_coarse")
        _at_least(
            self,
            1,
            "num_fine",
            "max_deg_point",
            "net_depth",
            "net_width",
            "net_width_condition",
            "skip_layer",
        )
        _at_least(self, 0, "deg_view")


@dataclass(frozen=True)
class FastConfig:
    """The fast model: a scale-aware hash grid with two small networks. Fields left at 0 follow the image size.

    Source: Mueller et al. 2022 (hash grid, occupancy grid); the attenuation is mip-NeRF's (equation 14) carried over.
    """

    levels: int = 0
    """Levels of the hash grid; 0: 6 for images up to 128 pixels wide, else 8."""
    features: int = 4
    """Features per entry: 2 or 4."""
    base_resolution: int = 16
    """Cells per side of the coarsest level."""
    finest_resolution: int = 0
    """Cells per side of the finest level, the others between in geometric progression; 0: by image width."""
    log2_table_size: int = 0
    """Entries of a hashed level, as a power of two; 0: by image width."""
    attenuation: Literal["gaussian", "erf", "none"] = "gaussian"
    """How the width of a sample's Gaussian attenuates the levels finer than it; none: the aliased baseline."""
    attenuation_cutoff: float = 0.02
    """Levels attenuated below this are skipped."""
    scale_input: bool = True
    """The logarithm of the Gaussian's width, clamped to the range of the training images, is a network input."""
    sampling: Literal["occupancy", "proposal"] = "occupancy"
    """How samples are found: by marching through an occupancy grid in a box, or, for scenes without a box, by a
    proposal network and mip-NeRF's resampling in contracted space."""
    proposal_samples: int = 64
    """Intervals of the proposal; of sampling = proposal, as the two below."""
    num_samples: int = 32
    """Intervals of the final level."""
    lindisp: bool = False
    """The proposal's intervals evenly in disparity instead of distance."""
    net_width: int = 64
    """Neurons of the hidden layers: a multiple of 8."""
    colour_layers: int = 1
    """Hidden layers of the colour network: 1 or 2."""
    mlp_dtype: FastMlpDtype = "auto"
    """Of the operands of the networks' products; sums and weights are float32. tf32: rounded to 10 fraction bits, for
    tensor cores; it needs a GPU of compute capability 8.0 or higher, where auto takes it. Elsewhere auto is fp32."""
    occupancy_resolution: int = 0
    """Cells per side of the occupancy grid, a multiple of 32; 0: by image width."""
    box_half: float = 1.5
    """The scene lies in the cube of twice this side around the origin, world units; with sampling = proposal, radius of
    the ball outside of which space is contracted."""
    step_scale: float = 1.0
    """Step along the ray in pixel widths at that distance."""
    min_step: float = 0.004
    """Shortest step, in t."""
    max_step: float = 0.03
    """Longest step, in t."""
    scale_ratio: float = 0.72
    """In multi-scale training, how often a scale is drawn relative to the next finer one."""
    random_background: bool = True
    """Where the images have alpha, train against a background drawn for every ray."""
    network_lr_ratio: float = 0.5
    """Learning rate of the networks, relative to the tables'."""
    lr_hold: float = 0.2
    """Share of the run before the learning rate begins to decay."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "levels", "finest_resolution", "log2_table_size", "occupancy_resolution")
        _at_least(self, 1, "base_resolution", "net_width")
        _one_of(self, "features", 2, 4)
        _one_of(self, "attenuation", "gaussian", "erf", "none")
        _one_of(self, "colour_layers", 1, 2)
        _one_of(self, "mlp_dtype", *get_args(FastMlpDtype))
        _one_of(self, "sampling", "occupancy", "proposal")
        _at_least(self, 1, "proposal_samples", "num_samples")
        if self.levels > 16:
            raise InputError(f"FastConfig.levels: must be at most 16, got {self.levels}")
        if self.log2_table_size and not 3 <= self.log2_table_size <= 26:
            raise InputError(f"FastConfig.log2_table_size: must be 3 to 26, got {self.log2_table_size}")
        if self.net_width % 8 or self.net_width > 256:
            raise InputError(f"FastConfig.net_width: must be a multiple of 8 up to 256, got {self.net_width}")
        if self.occupancy_resolution % 32 or self.occupancy_resolution > 512:
            raise InputError(
                "FastConfig.occupancy_resolution: must be a multiple of 32 up to 512, "
                f"got {self.occupancy_resolution}"
            )
        for name in ("box_half", "step_scale", "min_step", "scale_ratio", "network_lr_ratio"):
            if not getattr(self, name) > 0:
                raise InputError(f"FastConfig.{name}: must be positive, got {getattr(self, name)}")
        if self.max_step < self.min_step:
            raise InputError(
                f"FastConfig.max_step: must be at least min_step = {self.min_step}, got {self.max_step}"
            )
        if not 0 <= self.lr_hold < 1:
            raise InputError(f"FastConfig.lr_hold: must be in [0, 1), got {self.lr_hold}")
        if not 0 <= self.attenuation_cutoff < 1:
            raise InputError(
                f"FastConfig.attenuation_cutoff: must be in [0, 1), got {self.attenuation_cutoff}"
            )

    def for_images(self, width: int) -> FastConfig:
        """The same with every field that is 0 chosen for images of this width (the widest, of several scales)."""
        levels, finest, table, cells = next(sizes for widest, *sizes in _FAST_SIZES if width <= widest)
        return dataclasses.replace(
            self,
            levels=self.levels or levels,
            finest_resolution=self.finest_resolution or finest,
            log2_table_size=self.log2_table_size or table,
            occupancy_resolution=self.occupancy_resolution or cells,
        )


# Image width up to which: levels, finest resolution, log2 of the table size, occupancy resolution. A pixel at the
# middle of a Blender scene is about 1 / image width of the box; the finest level is somewhat finer.
_FAST_SIZES: tuple[tuple[int, int, int, int, int], ...] = (
    (128, 6, 160, 16, 64),
    (256, 8, 256, 17, 96),
    (512, 8, 640, 18, 128),
    (2**31, 8, 1600, 19, 128),
)

ModelConfig = MipNerfConfig | NerfConfig | FastConfig


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, but for the data and where it is run."""

    model: ModelConfig = field(default_factory=MipNerfConfig)
    """The network and its sampling."""
    batch_size: int = 4096
    """Rays per step; for the fast model samples per step, of as many rays as that makes."""
    batching: Literal["all_images", "single_image"] = "all_images"
    """Draw the pixels of a batch from all images, or from one."""
    max_steps: int = 1_000_000
    """Optimiser steps; the learning rate reaches lr_final at the end."""
    lr_init: float = 5e-4
    """First learning rate."""
    lr_final: float = 5e-6
    """Last learning rate."""
    lr_delay_steps: int = 2500
    """Length of the warm-up."""
    lr_delay_mult: float = 0.01
    """The warm-up starts from this fraction of the learning rate."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    grad_max_value: float = 0.0
    """Clip every gradient element to this size; 0: no clipping."""
    grad_max_norm: float = 0.0
    """Scale the gradient down to this norm, after clipping by value; 0: no clipping."""
    weight_decay_mult: float = 0.0
    """Weight of the mean squared parameter in the loss."""
    coarse_loss_mult: float = 0.1
    """Weight of every level but the last in the loss (equation 17)."""
    loss: Literal["mse", "smooth_l1", "charbonnier"] = "mse"
    """Penalty of a colour error. Smooth L1 at loss_beta = 1 is exactly half the squared error on this data."""
    loss_beta: float = 1.0
    """Where smooth L1 turns linear, or the constant of Charbonnier."""
    disable_multiscale_loss: bool = False
    """All rays weigh the same, whatever area they stand for: the ablation "no-area-loss"."""
    seed: int = 20200823
    """Of the initial weights and of every random number in training."""
    save_every: int = 10_000
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """How many of the last checkpoints stay, beside the best."""
    test_every: int = 5000
    """Steps between test renders, each of one test view in turn; 0: none."""
    print_every: int = 100
    """Steps between rows of metrics.csv; checkpoints and test renders have rows too."""
    chunk_rays: int = 0
    """Rays per forward and backward pass; 0: chosen from free memory. Only rounding depends on it."""
    capture: bool = True
    """On a GPU, record the step as a CUDA graph and replay it; without, every operation is launched: for debugging."""
    deterministic: bool = False
    """On a GPU, the same bits in every run: no sums of floats in the order in which threads come, a fixed workspace for
    cuBLAS. A CPU's are the same anyway."""
    max_skips_in_row: int = 20
    """The run ends, saved, when so many steps in a row were skipped because loss or gradient was not finite."""
    max_skips: int = 200
    """The same for all steps of the run."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "max_steps", "save_every", "keep_checkpoints", "print_every")
        _at_least(self, 1, "max_skips_in_row", "max_skips")
        _at_least(
            self, 0, "lr_delay_steps", "grad_max_value", "grad_max_norm", "weight_decay_mult", "test_every"
        )
        _at_least(self, 0, "coarse_loss_mult", "lr_delay_mult", "chunk_rays", "seed")
        for name in ("lr_init", "lr_final", "adam_eps", "loss_beta"):
            value = getattr(self, name)
            if not value > 0:
                raise InputError(f"TrainConfig.{name}: must be positive, got {value}")
        _one_of(self, "batching", "all_images", "single_image")
        _one_of(self, "loss", "mse", "smooth_l1", "charbonnier")
        if self.seed >= 2**63:
            raise InputError(f"TrainConfig.seed: must be below 2^63, got {self.seed}")


def _at_least(config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:
            raise InputError(f"{type(config).__name__}.{name}: must be at least {minimum}, got {value}")


def _one_of(config: Any, name: str, *allowed: str | int) -> None:
    value = getattr(config, name)
    if value not in allowed:
        names = ", ".join(map(str, allowed))
        raise InputError(f"{type(config).__name__}.{name}: expected one of {names}, got {value!r}")


_PAPER = TrainConfig()
_NO_MISC = MipNerfConfig(density_activation="relu", density_bias=0.0, rgb_padding=0.0)
# Measured on lego at 1/8 resolution, two CPU cores. Octaves above 12 are attenuated to nothing there, and at 1/2 of the
# resolution still; for the same number of rays, 1,000 steps of 512 end 1.2 dB above 500 of 1,024; and after 300 steps
# the rate 8e-3 is 1.0 dB ahead of 4e-3.
_SMALL = TrainConfig(
    model=MipNerfConfig(num_samples=32, max_deg_point=12, net_depth=3, net_width=64, net_width_condition=64),
    batch_size=512,
    max_steps=20_000,
    lr_init=8e-3,
    lr_final=4e-4,
    lr_delay_steps=100,
    lr_delay_mult=0.1,
    save_every=1000,
    test_every=1000,
    print_every=20,
)
_FAST = TrainConfig(
    model=FastConfig(),
    batch_size=8192,
    max_steps=30_000,
    lr_init=2e-2,
    lr_final=6e-4,
    lr_delay_steps=150,
    adam_eps=1e-15,
    loss="smooth_l1",
    loss_beta=0.1,
    disable_multiscale_loss=True,
    save_every=5000,
    test_every=5000,
    print_every=100,
)
# From arithmetic, not tuned on a GPU: as many samples a step as Tri-MipRF takes for the same data, a second colour
# layer, and more steps than an H200 should do in five minutes, so that --max-minutes ends a run. A step should take
# half a millisecond to one, so checkpoints and test views are rare. Table sizes follow the images, as on a CPU.
_FAST_GPU = dataclasses.replace(
    _FAST,
    model=FastConfig(colour_layers=2),
    batch_size=2**18,
    max_steps=1_000_000,
    save_every=50_000,
    test_every=50_000,
    print_every=1000,
)

PRESETS: dict[str, TrainConfig] = {
    "paper": _PAPER,
    "paper-single-scale": dataclasses.replace(_PAPER, batching="single_image"),
    "nerf": dataclasses.replace(
        _PAPER, model=NerfConfig(), coarse_loss_mult=1.0, disable_multiscale_loss=True
    ),
    "no-ipe": dataclasses.replace(_PAPER, model=MipNerfConfig(disable_integration=True)),
    "no-area-loss": dataclasses.replace(_PAPER, disable_multiscale_loss=True),
    "no-misc": dataclasses.replace(_PAPER, model=_NO_MISC),
    "separate-mlps": dataclasses.replace(_PAPER, model=MipNerfConfig(separate_mlps=True)),
    "small": _SMALL,
    "demo": dataclasses.replace(_SMALL, max_steps=2500, save_every=500, test_every=0),
    "fast": _FAST,
    "fast-gpu": _FAST_GPU,
}
PRESET_NOTES: dict[str, str] = {
    "paper": "mip-NeRF as published, for multi-scale data",
    "paper-single-scale": "the same for single-scale Blender data: pixels of one image per batch",
    "nerf": "NeRF, the comparison system: point samples, two networks",
    "no-ipe": "ablation: positional encoding without integration",
    "no-area-loss": "ablation: all rays weigh the same",
    "no-misc": "ablation: ReLU density, no bias, no padding of the colours",
    "separate-mlps": "ablation: a network of its own for each level",
    "small": "3 layers of 64 and 2 x 32 samples, for a laptop's CPU",
    "demo": "the small model for two minutes on the built-in scene: `benchmarks/demo.py --preset demo`",
    "fast": "the scale-aware hash grid: minutes on a laptop's CPU",
    "fast-gpu": "the same in batches for a large GPU, to be given --max-minutes; its sizes are not tuned yet",
}


# Fields of `TrainConfig` that decide nothing in the fast model's training, and what it does instead.
NOT_OF_FAST_MODEL = {
    "batching": "it draws a scale by its share, one of its images and a pixel for every ray",
    "grad_max_value": "it clips no gradient: what goes into its exponentials is clamped instead",
    "grad_max_norm": "it measures no norm of its gradient and clips none: what goes into its exponentials is clamped "
    "instead",
    "weight_decay_mult": "it has no weight decay: parameters that no sample touches are left alone",
    "coarse_loss_mult": "it renders one level",
    "loss": "its penalty of a colour error is always smooth L1, with its bend at loss_beta",
    "disable_multiscale_loss": "all its rays weigh the same, and coarse scales are drawn less often: see scale_ratio",
    "chunk_rays": "it has no passes to cut: its step goes through its samples in groups that fit anyway",
}


def check_options(config: TrainConfig) -> None:
    """Refuse options that the configured model's training does not have.

    Configurations are made and read without this, so that runs from before it can be evaluated and resumed.

    Errors: InputError naming the field.
    """
    if not isinstance(config.model, FastConfig):
        return
    for name, instead in NOT_OF_FAST_MODEL.items():
        found, fixed = getattr(config, name), getattr(_FAST, name)
        if found != fixed:
            raise InputError(
                f"TrainConfig.{name}: is {found!r}, but the fast model has no such option: {instead}; leave it at "
                f"{fixed!r}"
            )


def preset(name: str) -> TrainConfig:
    """The preset of this name.

    Errors: InputError for an unknown name, listing those there are.
    """
    if name not in PRESETS:
        raise InputError(f"--preset: unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


_MODELS: dict[str, type[ModelConfig]] = {
    "mipnerf": MipNerfConfig,
    "nerf": NerfConfig,
    "fast": FastConfig,
}


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """A configuration as JSON-ready values; the model's carry their "kind"."""
    kind = next(kind for kind, cls in _MODELS.items() if type(config.model) is cls)
    return dataclasses.asdict(config) | {"model": {"kind": kind} | dataclasses.asdict(config.model)}


def from_dict(values: dict[str, Any], where: str = "config") -> TrainConfig:
    """The inverse of `to_dict`.

    Args:
        values: what `to_dict` returned, possibly through JSON.
        where: what to call the source in an error.

    Errors: InputError naming the field that is unknown, missing or of the wrong type.
    """
    values = dict(_mapping(values, where))
    model = dict(_mapping(values.pop("model", None), f"{where}: model"))
    kind = model.pop("kind", None)
    if kind not in _MODELS:
        raise InputError(f"{where}: model.kind: expected one of {', '.join(_MODELS)}, found {kind!r}")
    built = _build(_MODELS[kind], model, f"{where}: model")
    config: TrainConfig = _build(TrainConfig, values, where, model=built)
    return config


# Fields that files from before them lack; their defaults mean what the package did then.
_ADDED_LATER: dict[type[Any], set[str]] = {
    MipNerfConfig: {"mlp_backend", "mlp_dtype", "mlp_deterministic"},
    FastConfig: {"sampling", "proposal_samples", "num_samples", "lindisp", "mlp_dtype"},
    TrainConfig: {"capture", "deterministic", "max_skips_in_row", "max_skips"},
}


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, found {type(values).__name__}")
    return values


def _build(cls: type[Any], values: dict[str, Any], where: str, **built: Any) -> Any:
    defaults = {f.name: getattr(cls(), f.name) for f in dataclasses.fields(cls) if f.name not in built}
    for name, value in values.items():
        if name not in defaults:
            raise InputError(f"{where}: unknown field {name!r}")
        wanted = type(defaults[name])
        is_number = wanted is float and isinstance(value, int) and not isinstance(value, bool)
        if type(value) is not wanted and not is_number:
            raise InputError(f"{where}: {name}: expected {wanted.__name__}, found {value!r}")
    missing = defaults.keys() - values.keys() - _ADDED_LATER.get(cls, set())
    if missing:
        raise InputError(f"{where}: missing field {sorted(missing)[0]!r}")
    return cls(**values, **built)
