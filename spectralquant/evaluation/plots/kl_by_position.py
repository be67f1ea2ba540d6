"""KL over the position of the scored token behind its context: whether errors grow as the text goes on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectralquant.evaluation.methods import Method
from spectralquant.evaluation.plots.labels import EndLabel, end_label, freeze_layout, spread_ends
from spectralquant.evaluation.plots.style import COLUMN, OURS, Style, family_styles, new_figure, points_of, scale_kl, set_apart

if TYPE_CHECKING:
    from spectralquant.evaluation.report import RunReport

DASHES = ("-", "--", "-.", ":")
"""Of this package's methods, which share a colour."""


def draw_kl_by_position(report: "RunReport", context: int) -> Any:
    """This package's methods, and of every other family the one that is nearest to them in size; means over windows and texts. None where there is nothing to
    draw."""
    _, panels = set_apart({context: points_of(report, context)})
    if not panels:
        return None
    methods = _chosen([(p.method, p.bits) for p in panels[context]])
    points = [p for p in panels[context] if p.method in methods]
    styles, piece = family_styles(report.methods), report.config["plan"]["chunk"]
    figure = new_figure(COLUMN, 4.4)
    axes = figure.subplots()
    ends, seen, ours = [], [], [method for method in methods if method.family == OURS]
    for method in methods:
        values = _mean_curve([line["kl_by_position"] for line in report.language if line["context"] == context and line["method"] == method.name])
        places = [piece * (i + 0.5) for i in range(len(values))]
        dashes = DASHES[ours.index(method) % len(DASHES)] if method in ours else "-"
        ends.append(_plot_line(axes, method, places, values, styles[method.family], dashes))
        seen += values
    axes.set(title=f"{context:,} tokens of context", xlabel="scored token behind the context", ylabel="KL in nats per token")
    scale_kl(axes, points)
    if positive := [value for value in seen if value > 0]:
        axes.set_ylim(min(positive) / 1.5, max(positive) * 1.5)
    freeze_layout(figure)
    spread_ends(axes, ends)
    return figure


def _chosen(sized: Sequence[tuple[Method, float]]) -> list[Method]:
    """Of methods and their bits: ours, and one of each other family."""
    ours = [bits for method, bits in sized if method.family == OURS]
    middle = sorted(ours)[len(ours) // 2] if ours else 2.5
    nearest: dict[str, tuple[Method, float]] = {}
    for method, bits in sized:
        best = nearest.get(method.family)
        if best is None or abs(bits - middle) < abs(best[1] - middle):
            nearest[method.family] = method, bits
    return [method for method, _ in sized if method.family == OURS or nearest[method.family][0] is method]


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*curves, strict=False)]


def _plot_line(axes: Any, method: Method, places: Sequence[float], values: Sequence[float], style: Style, dashes: str) -> EndLabel:
    width, mark = 0.75 * style.width, {"marker": style.marker, "ms": 0.45 * style.size}
    axes.plot(places, values, color=style.colour, lw=width, zorder=style.order, ls=dashes, **mark)
    return end_label(axes, method.name, places[-1], values[-1], style)
