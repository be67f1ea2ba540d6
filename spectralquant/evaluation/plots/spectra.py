"""Spectra of K or V, a small panel per layer, with the split into a semantic band and a tail."""

from typing import Any

import torch
from torch import Tensor

from spectralquant.codec.budget import semantic_size
from spectralquant.evaluation.plots.style import COLUMN, SIDE_COLOURS, TAIL, new_figure
from spectralquant.profile import Profile

FLOOR = 1e-4
"""Least share of the largest variance that is drawn."""


def draw_spectra(profile: Profile, side: str, share: float) -> Any:
    """Variances of the coordinates of `side` ("key" or "value"), mean over heads, as shares of each layer's largest, on a logarithmic scale.

    Args:
        share: Of the variance, that the semantic band holds.
    """
    columns = 4 if len(profile.layers) <= 12 else 6 if len(profile.layers) <= 48 else 8
    rows = -(-len(profile.layers) // columns)
    figure = new_figure(COLUMN, 0.5 + 0.72 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    grid[0].set_yscale("log")
    for axes, (index, layer) in zip(grid, profile.layers.items(), strict=False):
        variance = getattr(layer, side).variance
        _plot_layer(axes, _shape(variance), semantic_size(variance, share), SIDE_COLOURS[side])
        axes.set_title(str(index), fontsize=8, pad=2)
    for axes in grid[len(profile.layers) :]:
        axes.set_visible(False)
    dim = getattr(next(iter(profile.layers.values())), side).variance.shape[1]
    grid[0].set(xlim=(0, dim), ylim=(FLOOR, 2.5))
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.025)
    figure.supxlabel(f"coordinate, 1 to {dim}", fontsize=9)
    figure.supylabel(f"variance, logarithmic, 1 down to {FLOOR:g}", fontsize=9)
    return figure


def _shape(variance: Tensor) -> Tensor:
    """[D], mean over heads [H, D] of the shares of each head's largest variance."""
    return (variance.double() / variance.double()[:, :1].clamp_min(1e-30)).mean(0).clamp_min(FLOOR)


def _plot_layer(axes: Any, shape: Tensor, band: int, colour: str) -> None:
    """Two filled areas of steps, one step a coordinate, and the number of coordinates in the first."""
    edges, heights = torch.arange(len(shape) + 1).tolist(), [*shape.tolist(), float(shape[-1])]
    for first, last, fill in ((0, band, colour), (band, len(shape), TAIL)):
        if first < last:
            axes.fill_between(edges[first : last + 1], heights[first : last + 1], FLOOR, step="post", color=fill, lw=0)
    axes.text(0.95, 0.93, str(band), transform=axes.transAxes, ha="right", va="top", fontsize=8)
    axes.set(xticks=[], yticks=[])
    axes.minorticks_off()
    axes.grid(False)
