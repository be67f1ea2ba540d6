"""Widths of the coordinates of K or V, layer by coordinate: where the bits go."""

from typing import Any

import torch
from torch import Tensor

from spectralquant.codec.budget import coordinate_bits, plane_counts
from spectralquant.config import Dials
from spectralquant.evaluation.plots.style import COLUMN, new_figure
from spectralquant.presets import BIT_WIDTHS, CompressionPreset
from spectralquant.profile import Profile


def mean_widths(profile: Profile, preset: CompressionPreset, side: str) -> Tensor:
    """[layers, D]: widths of scalar planes, mean over heads, of `side` "key" or "value"."""
    planes = dict(zip(("key", "value"), plane_counts(profile, preset, Dials()), strict=True))[side]
    rows = [coordinate_bits(getattr(layer, side).variance, planes, Dials(), preset, side).double().mean(0) for layer in profile.layers.values()]
    return torch.stack(rows)


def draw_bit_allocation(profile: Profile, preset: CompressionPreset, side: str) -> Any:
    from matplotlib.ticker import MaxNLocator

    widths = mean_widths(profile, preset, side)
    layers, dim = widths.shape
    figure = new_figure(COLUMN, 1.6 + min(max(0.085 * layers, 1.2), 4.5))
    axes = figure.subplots()
    image = axes.imshow(
        widths.numpy(), cmap="viridis", vmin=0, vmax=BIT_WIDTHS[-1], aspect="auto", interpolation="none", extent=(0.5, dim + 0.5, layers - 0.5, -0.5)
    )
    axes.set(xlabel="coordinate, by falling variance", ylabel="layer")
    indices = list(profile.layers)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(lambda y, _: str(indices[round(y)]) if 0 <= round(y) < layers else "")
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.9, aspect=30, ticks=BIT_WIDTHS)
    bar.set_label("bits per coordinate, mean over heads", fontsize=9)
    bar.outline.set_visible(False)
    return figure
