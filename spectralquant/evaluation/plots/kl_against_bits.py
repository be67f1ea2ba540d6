"""KL against all-in bits, a panel per context: the Pareto picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectralquant.evaluation.plots.labels import freeze_layout, label_points
from spectralquant.evaluation.plots.style import (
    COLUMN,
    Point,
    Style,
    family_legend,
    family_styles,
    footnote,
    new_figure,
    plot_families,
    points_of,
    scale_bits,
    scale_kl,
    set_apart,
)

if TYPE_CHECKING:
    from spectralquant.evaluation.report import RunReport


def draw_kl_against_bits(report: "RunReport") -> Any:
    panels = {context: points_of(report, context) for context in dict.fromkeys(line["context"] for line in report.language)}
    below, panels = set_apart(panels)
    if not panels:
        return None
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    figure = new_figure(2 + 6.2 * columns, 0.9 + 5.4 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    styles = family_styles(report.methods)
    for axes, (context, points) in zip(grid, panels.items(), strict=False):
        _plot_panel(axes, context, points, styles)
        axes.tick_params(labelbottom=True)
    for axes in grid[::columns]:
        axes.set_ylabel("KL in nats per token")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    every = [point for points in panels.values() for point in points]
    scale_bits(grid[0], [p.bits for p in every])
    scale_kl(grid[0], every)
    family_legend(figure, every, styles)
    footnote(figure, report, below)
    freeze_layout(figure)
    for axes, points in zip(grid, panels.values(), strict=False):
        label_points(axes, points, styles)
    return figure


def draw_kl_against_bits_at(report: "RunReport", context: int) -> Any:
    """One context, in the width of a column: names stand at the points, and there is neither legend nor footnote. None where there is nothing to draw."""
    _, panels = set_apart({context: points_of(report, context)})
    if not panels:
        return None
    points, styles = panels[context], family_styles(report.methods)
    figure = new_figure(COLUMN, 4.9)
    axes = figure.subplots()
    _plot_panel(axes, context, points, styles)
    axes.set_ylabel("KL in nats per token")
    scale_bits(axes, [p.bits for p in points])
    scale_kl(axes, points)
    freeze_layout(figure)
    label_points(axes, points, styles)
    return figure


def _plot_panel(axes: Any, context: int, points: Sequence[Point], styles: dict[str, Style]) -> None:
    plot_families(axes, points, styles)
    axes.set(title=f"{context:,} tokens of context", xlabel="bits per element, all-in")
