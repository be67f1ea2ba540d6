"""KL against context length, a panel per text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectralquant.evaluation.plots.labels import freeze_layout
from spectralquant.evaluation.plots.style import Point, Style, family_styles, footnote, marker, new_figure, points_of, scale_kl, set_apart, text_style

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
    labels: list[tuple[Any, list[tuple[Any, Point, int]]]] = []
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
    for axes, texts_at_end in labels:
        _spread_labels(axes, texts_at_end, contexts[-1])
    return figure


def _plot_curve(axes: Any, curve: Sequence[tuple[int, Point]], styles: dict[str, Style]) -> tuple[Any, Point, int]:
    """Draw one method's line and its name right of the axes; returns the name's text, its point and the context there."""
    context, end = curve[-1]
    style = styles[end.method.family]
    x, y, error = [c for c, _ in curve], [p.kl for _, p in curve], [p.error for _, p in curve]
    axes.errorbar(x, y, error, lw=style.width, zorder=style.order, capsize=2.5, elinewidth=1.0, **marker(end.method, style))
    transform = axes.get_yaxis_transform()  # x in shares of the axes, y in data
    text = axes.text(1.06, end.kl, end.method.name, transform=transform, va="center", **text_style(style))
    return text, end, context


def _scale_contexts(axes: Any, contexts: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(contexts[0] / 1.15, contexts[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def _spread_labels(axes: Any, labels: Sequence[tuple[Any, Point, int]], last: int) -> None:
    """Move the names apart and join each to its line's end."""
    gap = 12.5 * axes.figure.dpi / 72
    to_pixels, to_data, to_share, mixed = axes.transData, axes.transData.inverted(), axes.transAxes.inverted(), axes.get_yaxis_transform()
    wanted = [float(to_pixels.transform((last, point.kl))[1]) for _, point, _ in labels]
    order = sorted(range(len(labels)), key=wanted.__getitem__)
    for i, y in zip(order, spread([wanted[i] for i in order], gap, axes.bbox.y0, axes.bbox.y1), strict=True):
        text, point, context = labels[i]
        height = float(to_data.transform((0, y))[1])
        text.set_y(height)
        end = float(to_share.transform(to_pixels.transform((context, point.kl)))[0])
        line = [end + 0.012, 1.0, 1.05], [point.kl, point.kl, height]
        axes.plot(*line, transform=mixed, clip_on=False, lw=0.7, color=text.get_color(), alpha=0.6)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions nearest to `wanted` (ascending) in least squares that are `gap` apart, then moved into [low, high] where they fit.

    Without i * gap they are the isotonic regression of `wanted` without i * gap: neighbours in the wrong order are pooled.
    """
    pools: list[tuple[float, int]] = []  # (mean, count)
    for i, value in enumerate(wanted):
        pools.append((value - i * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append(((a * n + b * m) / (n + m), n + m))
    means = [mean for mean, count in pools for _ in range(count)]
    top = high - gap * (len(wanted) - 1)
    return [max(min(mean, top), low) + i * gap for i, mean in enumerate(means)]
