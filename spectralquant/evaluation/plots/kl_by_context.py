"""KL against context length, a panel per text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectralquant.evaluation.plots.labels import EndLabel, end_label, freeze_layout, spread_ends
from spectralquant.evaluation.plots.style import Point, Style, family_styles, footnote, marker, new_figure, points_of, scale_kl, set_apart

if TYPE_CHECKING:
    from spectralquant.evaluation.report import RunReport


def draw_kl_by_context(report: "RunReport") -> Any:
    contexts = sorted({line["context"] for line in report.language})
    if len(contexts) < 2:
        return None
    texts = list(dict.fromkeys(line["text"] for line in report.language))
    panels = {(text, context): points_of(report, context, text) for text in texts for context in contexts}
    below, panels = set_apart(panels)
    if not panels:
        return None
    count = len({p.method.name for points in panels.values() for p in points})
    figure = new_figure(1.5 + 6 * len(texts), max(5.0, 1.8 + 0.24 * count))
    grid = figure.subplots(1, len(texts), sharex=True, sharey=True, squeeze=False)[0]
    styles = family_styles(report.methods)
    scale_kl(grid[0], (p for points in panels.values() for p in points))
    labels: list[tuple[Any, list[EndLabel]]] = []
    for axes, text in zip(grid, texts, strict=True):
        curves: dict[str, list[tuple[int, Point]]] = {}
        for context in contexts:
            for point in panels.get((text, context), []):
                curves.setdefault(point.method.name, []).append((context, point))
        labels.append((axes, [_plot_curve(axes, curve, styles) for curve in curves.values()]))
        axes.set(title=text, xlabel="tokens of context", ylabel="KL in nats per token")
        axes.label_outer()
    _scale_contexts(grid[0], contexts)
    footnote(figure, report, below)
    freeze_layout(figure)
    for axes, ends in labels:
        spread_ends(axes, ends)
    return figure


def _plot_curve(axes: Any, curve: Sequence[tuple[int, Point]], styles: dict[str, Style]) -> EndLabel:
    """Draw one method's line and its name right of the axes."""
    context, end = curve[-1]
    style = styles[end.method.family]
    x, y, error = [c for c, _ in curve], [p.kl for _, p in curve], [p.error for _, p in curve]
    axes.errorbar(x, y, error, lw=style.width, zorder=style.order, capsize=2.5, elinewidth=1.0, **marker(end.method, style))
    return end_label(axes, end.method.name, context, end.kl, style)


def _scale_contexts(axes: Any, contexts: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(contexts[0] / 1.15, contexts[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
