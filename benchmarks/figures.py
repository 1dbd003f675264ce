"""Draws the pictures that explain mip-NeRF, each from the package's own functions.

python benchmarks/figures.py --out outputs/figures
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

# So that the checkout is found without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Ellipse, Polygon

from mipnerf_fast import reference

INK, SOFT, BLUE, ORANGE, GREEN = "#22303c", "#9aa5b1", "#2f6db5", "#e07b39", "#3a8f5c"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
}


def encodings(path: Path) -> None:
    """Point and integrated encodings of positions along a line, as a row of pixels would sample them."""
    pixels, octaves = 53, 8  # a prime number of pixels, so that no octave happens to fit them
    spacing = 2 * math.pi / pixels
    x = (torch.arange(pixels, dtype=torch.float64) + 0.5) * spacing
    means = torch.stack([x, x, x], -1)[None]
    widths = [
        ("one point per pixel (NeRF)", 0.0),
        ("integrated over the pixel", 1.0),
        ("over four pixels", 4.0),
    ]
    figure, axes = plt.subplots(
        2, len(widths), figsize=(11, 5.2), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    for column, (title, width) in enumerate(widths):
        # A pixel that many spacings wide has this variance along the line.
        variance = (width * spacing) ** 2 / 12
        features = reference.integrated_pos_enc(means, torch.full_like(means, variance), 0, octaves)[0]
        sines = features[:, : 3 * octaves : 3].T.numpy()
        image = axes[0, column].imshow(
            sines,
            cmap="RdBu_r",
            vmin=-1,
            vmax=1,
            aspect="auto",
            origin="lower",
            extent=(0, 2 * math.pi, -0.5, octaves - 0.5),
            interpolation="nearest",
        )
        axes[0, column].set_title(title)
        axes[0, column].spines[:].set_visible(False)
        fine = torch.linspace(0, 2 * math.pi, 4000, dtype=torch.float64)
        for octave, colour in ((1, SOFT), (3, BLUE), (6, ORANGE)):
            factor = math.exp(-0.5 * 4.0**octave * variance)
            curve = factor * torch.sin(2.0**octave * fine)
            axes[1, column].plot(fine, curve, color=colour, lw=0.7, alpha=0.55)
            axes[1, column].plot(x, sines[octave], "o", ms=2.8, color=colour, label=f"octave {octave}")
        axes[1, column].set_ylim(-1.15, 1.15)
        axes[1, column].set_xlabel("position")
        axes[1, column].set_xticks([0, math.pi, 2 * math.pi], ["0", "π", "2π"])
    axes[0, 0].set_ylabel("octave")
    axes[1, 0].set_ylabel("feature")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.colorbar(image, ax=axes[0, :], shrink=0.85, pad=0.01, label=r"$\mathrm{E}[\sin(2^k x)]$")
    figure.suptitle(
        "Octaves finer than a pixel alias when sampled at points; integrated, they fade to zero", x=0.47
    )
    figure.savefig(path)
    plt.close(figure)


def _draw_gaussians(axis: Any, t_vals: torch.Tensor, radius: float, shape: str) -> None:
    """The frusta of one ray along x, in the x-y plane, with one- and two-sigma ellipses and samples of their volume."""
    rays = (
        torch.zeros(1, 3).double(),
        torch.tensor([[1.0, 0.0, 0.0]]).double(),
        torch.tensor([[radius]]).double(),
    )
    means, covariances = reference.frustum_gaussians(t_vals[None], *rays, shape=shape, full_covariance=True)
    generator = np.random.default_rng(0)
    for k, (mean, covariance) in enumerate(zip(means[0].numpy(), covariances[0].numpy(), strict=True)):
        t0, t1 = float(t_vals[k]), float(t_vals[k + 1])
        colour = BLUE if k % 2 == 0 else ORANGE
        r0, r1 = (radius * t0, radius * t1) if shape == "cone" else (radius, radius)
        axis.add_patch(Polygon([(t0, -r0), (t1, -r1), (t1, r1), (t0, r0)], fc=colour, alpha=0.13, lw=0))
        axis.plot([t0, t0], [-r0, r0], color=SOFT, lw=0.8)
        # Uniform points of the solid, projected onto the plane of the picture.
        u = generator.random(260)
        t = np.cbrt(t0**3 + (t1**3 - t0**3) * u) if shape == "cone" else t0 + (t1 - t0) * u
        distance, angle = np.sqrt(generator.random(260)), 2 * math.pi * generator.random(260)
        y = radius * distance * np.cos(angle) * (t if shape == "cone" else 1.0)
        axis.plot(t, y, ".", color=colour, ms=2.4, alpha=0.55, mew=0)
        variances, vectors = np.linalg.eigh(covariance[:2, :2])
        turn = math.degrees(math.atan2(vectors[1, 1], vectors[0, 1]))
        for sigma, width in ((1, 1.6), (2, 0.8)):
            size = 2 * sigma * np.sqrt(variances)
            axis.add_patch(Ellipse(mean[:2], size[1], size[0], angle=turn, fill=False, ec=colour, lw=width))
        axis.plot(*mean[:2], "+", color=INK, ms=6, mew=1.1)
    last = radius * float(t_vals[-1]) if shape == "cone" else radius
    axis.plot([float(t_vals[-1])] * 2, [-last, last], color=SOFT, lw=0.8)
    axis.plot([0, float(t_vals[-1]) + 0.15], [0, 0], color=INK, lw=0.7, ls=(0, (6, 4)))


def frusta(path: Path) -> None:
    """A cone and a cylinder cut by fenceposts, and the Gaussians that stand for the pieces."""
    t_vals = torch.tensor([1.0, 1.35, 1.8, 2.6, 3.0, 3.3, 4.0, 5.2], dtype=torch.float64)
    figure, axes = plt.subplots(2, 1, figsize=(10, 5.7))
    for axis, shape, radius, half in ((axes[0], "cone", 0.16, 0.9), (axes[1], "cylinder", 0.42, 0.55)):
        _draw_gaussians(axis, t_vals, radius, shape)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.set(xlim=(-0.1, 5.4), ylim=(-half, half))
    # The same scale in both, along and across: heights in proportion to what they show.
    unit = 0.9 / 5.5
    axes[0].set_position((0.05, 0.42, 0.9, 1.8 * unit * 10 / 5.7))
    axes[1].set_position((0.05, 0.0, 0.9, 1.1 * unit * 10 / 5.7))
    for sign in (-1, 1):
        axes[0].plot([0, 5.2], [0, sign * 0.16 * 5.2], color=SOFT, lw=0.8)
    axes[0].plot(0, 0, "o", color=INK, ms=5)
    axes[0].set_title(
        "The cone of a pixel (radius much exaggerated): points of each frustum, its mean, 1 and 2 sigma"
    )
    axes[1].set_title("The same intervals of a cylinder, as for rays in normalised device coordinates")
    axes[1].set_xlabel("distance t along the ray")
    figure.savefig(path)
    plt.close(figure)


def resampling(path: Path) -> None:
    """Density, weights, blurred weights, their CDF and the fenceposts drawn from it, along one ray."""
    near, far, count, padding = 2.0, 6.0, 24, 0.01
    t_vals = reference.sample_t_vals(torch.tensor([[near]]).double(), torch.tensor([[far]]).double(), count)

    def density(t: torch.Tensor) -> torch.Tensor:
        haze = 0.5 * torch.exp(-(((t - 3.2) / 0.18) ** 2) / 2)
        return haze + 9.0 * torch.sigmoid((t - 4.35) * 30) * torch.sigmoid((4.9 - t) * 30)

    mids = (t_vals[:, 1:] + t_vals[:, :-1]) / 2
    directions = torch.tensor([[0.0, 0.0, 1.0]]).double()
    level = reference.composite(
        torch.ones(1, count, 3).double(), density(mids)[..., None], t_vals, directions, white_background=False
    )
    blurred = reference.blur_weights(level.weights, padding)
    fine = reference.resample(t_vals, level.weights, padding=padding)[0]
    edges, weights, smooth = t_vals[0].numpy(), level.weights[0].numpy(), blurred[0].numpy()

    figure, axes = plt.subplots(
        3, 1, figsize=(10, 7.4), sharex=True, height_ratios=(2, 2, 2.4), layout="constrained"
    )
    t = torch.linspace(near, far, 1000, dtype=torch.float64)
    axes[0].fill_between(t, density(t), color=SOFT, alpha=0.3, lw=0)
    axes[0].plot(t, density(t), color=INK, lw=1.2, label="density")
    axes[0].set_ylabel("density")
    axes[0].set_title("A thin haze, then something solid")

    axes[1].stairs(weights, edges, color=BLUE, fill=True, alpha=0.35, label="weights of the coarse level")
    axes[1].stairs(smooth, edges, color=ORANGE, lw=1.8, label=f"blurred and padded by {padding:g}")
    axes[1].set_ylabel("weight")
    axes[1].legend(loc="upper left")
    axes[1].set_title(
        "Each weight becomes the mean of the larger ones towards its two neighbours (equation 18)"
    )

    cdf = np.concatenate([[0.0], np.cumsum(smooth) / smooth.sum()])
    axes[2].plot(edges, cdf, color=ORANGE, lw=1.8)
    levels = np.linspace(0, 1, len(fine))
    for position, u in zip(fine.numpy(), levels, strict=True):
        axes[2].plot([near, position, position], [u, u, 0], color=GREEN, lw=0.5, alpha=0.55)
    axes[2].plot(edges, np.full_like(edges, -0.09), "|", color=BLUE, ms=13, mew=1.3)
    axes[2].plot(fine, np.full_like(fine, -0.24), "|", color=GREEN, ms=13, mew=1.3)
    axes[2].text(far + 0.06, -0.09, "coarse fenceposts", color=BLUE, va="center")
    axes[2].text(far + 0.06, -0.24, "fine fenceposts", color=GREEN, va="center")
    axes[2].set_ylim(-0.34, 1.04)
    axes[2].set_yticks([0, 0.5, 1])
    axes[2].set_xlim(near, far)
    axes[2].set_ylabel("CDF")
    axes[2].set_xlabel("distance t along the ray")
    axes[2].set_title(
        "Evenly spaced positions of the CDF give the fine level's fenceposts, which replace the coarse ones"
    )
    figure.savefig(path)
    plt.close(figure)


FIGURES = {"encodings.png": encodings, "frusta.png": frusta, "resampling.png": resampling}


def main(argv: list[str] | None = None) -> int:
    """Draw every figure into a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/figures"), help="folder for the pictures")
    out: Path = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            draw(out / name)
            print(out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
