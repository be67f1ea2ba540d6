"""Share of needles found, methods by depth, a panel per length."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectralquant.evaluation.methods import find_method
from spectralquant.evaluation.plots.style import GREY, LIGHT, OUR_COLOUR, OURS, new_figure

if TYPE_CHECKING:
    from spectralquant.evaluation.report import RunReport


def draw_agreement_by_depth(report: "RunReport") -> Any:
    cells = {(line["length"], line["method"], line["depth"]): line["accuracy"] for line in report.needles if line["kind"] is None}
    lengths = sorted({length for length, *_ in cells if length is not None})
    depths = sorted({depth for *_, depth in cells if depth is not None})
    names = list(dict.fromkeys(name for _, name, _ in cells))
    if not cells:
        return None
    figure = new_figure(2.9 + len(lengths) * (0.72 * (len(depths) + 1) + 0.5), 1.5 + 0.36 * len(names))
    grid = figure.subplots(1, len(lengths), squeeze=False)[0]
    for axes, length in zip(grid, lengths, strict=True):
        table = [[cells.get((length, name, depth), math.nan) for depth in (*depths, None)] for name in names]
        _plot_cells(axes, table)
        axes.set(title=f"{length:,} tokens", xlabel="depth of the needle")
        axes.set_xticks([*range(len(depths)), len(depths) + 0.25], [*(f"{100 * depth:.4g} %" for depth in depths), "all"])
        axes.set_yticks(range(len(names)), [find_method(name).label for name in names] if axes is grid[0] else [])
        for label, name in zip(axes.get_yticklabels(), names, strict=False):
            if find_method(name).family == OURS:
                label.set(color=OUR_COLOUR, weight="bold")
    figure.supxlabel(f"{report.config['plan']['model']}: share of needles found, in %", fontsize=9, color=GREY)
    return figure


def _plot_cells(axes: Any, table: Sequence[Sequence[float]]) -> None:
    """Shares as tiles with their number; the last column, the mean, stands apart."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps["Blues"]
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            x = column + 0.25 * (column == len(values) - 1)
            known = math.isfinite(value)
            fill, ink = (colours(0.05 + 0.8 * value) if known else LIGHT), ("white" if known and value > 0.6 else "#222222")
            axes.add_patch(Rectangle((x - 0.47, row - 0.46), 0.94, 0.92, color=fill, lw=0))
            axes.text(x, row, f"{100 * value:.0f}" if known else "-", ha="center", va="center_baseline", fontsize=9.5, color=ink)
    axes.set(xlim=(-0.55, len(table[0]) - 0.2), ylim=(len(table) - 0.45, -0.55))
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
