"""Bits of the coordinates of K or V, layer by coordinate: where the budget goes."""

from typing import Any

import torch
from torch import Tensor

from spectralquant.codec.budget import coordinate_bits, plane_counts
from spectralquant.codec.joint import JointPlanes, block_index
from spectralquant.config import Dials
from spectralquant.evaluation.plots.style import COLUMN, new_figure
from spectralquant.presets import BIT_WIDTHS, CompressionPreset
from spectralquant.profile import Profile, SideProfile

SAMPLES = 512
"""Gaussian vectors on which joint codes are measured."""


def coded_jointly(profile: Profile, preset: CompressionPreset) -> bool:
    """Whether the profile has the codebooks of V at the preset's size."""
    return plane_counts(profile, preset, Dials())[1] in profile.codebooks


def mean_bits(profile: Profile, preset: CompressionPreset, side: str) -> Tensor:
    """[layers, D], mean over heads, of `side` "key" or "value": the widths of scalar codes, or for V that is `coded_jointly` what its codes are worth."""
    planes = plane_counts(profile, preset, Dials())[side == "value"]
    rows = []
    for index, layer in profile.layers.items():
        own: SideProfile = getattr(layer, side)
        if side == "value" and coded_jointly(profile, preset):
            bits = worth_of_joint_codes(profile.codebooks[planes][index], own.variance)
        else:
            bits = coordinate_bits(own.variance, planes, Dials(), preset, side)
        rows.append(bits.double().mean(0))
    return torch.stack(rows)


def worth_of_joint_codes(book: Tensor, variance: Tensor) -> Tensor:
    """[H, D]: log2(variance / mean squared error) / 2 of every coordinate, for Gaussian vectors of `variance` [H, D] and codebooks `book`. That many bits
    would an ideal code of the coordinate alone take for the same error."""
    heads, dim = variance.shape
    quantizer = JointPlanes(book, variance.clamp_min(1e-20).sqrt(), torch.ones(heads, dim, dtype=torch.bool), block_index(dim))
    u = torch.randn((1, heads, SAMPLES, dim), generator=torch.Generator().manual_seed(0))
    rms = u.square().mean(-1, keepdim=True).sqrt()
    _, levels = quantizer.quantize(u / rms)
    error = (levels * rms - u).square().mean((0, 2)) / u.square().mean((0, 2))
    return (-error.log2() / 2).clamp_min(0.0)


def draw_bit_allocation(profile: Profile, preset: CompressionPreset, side: str) -> Any:
    """`mean_bits` as a map."""
    from matplotlib.ticker import MaxNLocator

    bits = mean_bits(profile, preset, side)
    layers, dim = bits.shape
    figure = new_figure(COLUMN, 1.6 + min(max(0.085 * layers, 1.2), 4.5))
    axes = figure.subplots()
    place = (0.5, dim + 0.5, layers - 0.5, -0.5)
    image = axes.imshow(bits.numpy(), cmap="viridis", vmin=0, vmax=BIT_WIDTHS[-1], aspect="auto", interpolation="none", extent=place)
    axes.set(xlabel="coordinate, by falling variance", ylabel="layer")
    indices = list(profile.layers)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(lambda y, _: str(indices[round(y)]) if 0 <= round(y) < layers else "")
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.9, aspect=30, ticks=BIT_WIDTHS)
    bar.set_label("bits per coordinate, mean over heads", fontsize=9)
    bar.outline.set_visible(False)
    return figure
