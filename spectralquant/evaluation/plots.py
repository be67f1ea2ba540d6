"""Pictures of a run: error against size, error against context length, needles by depth. matplotlib is imported when a plot is drawn, and here only.

Methods of 16 bits are left out of the pictures of KL where there are others: their error is that of rounding, and decades of empty axis would
press everything else together. A line below the picture gives it.
"""

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import Method, find_method

if TYPE_CHECKING:
    from spectralquant.evaluation.report import RunReport

OURS = "spectralquant"
"""The family that is drawn on top."""
OUR_COLOUR, GREY, LIGHT = "#D55E00", "#555555", "#DDDDDD"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#8A8A2A", "#332288", "#44AA99", "#606060")
"""Okabe and Ito's colours, which are told apart with any colour vision, ours taken out and a few of Tol's added. There is one marker more than
colours: a second round has other pairs."""
MARKERS = "s^Dv<>phdPX"
BITS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
SETTINGS = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11, "legend.fontsize": 10, "legend.frameon": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.edgecolor": "#999999", "axes.spines.top": False,
    "axes.spines.right": False, "xtick.color": "#444444", "ytick.color": "#444444",
}  # fmt: skip
DPI = 150


@dataclass(frozen=True, slots=True)
class Point:
    """One method in one panel: all-in bits, mean KL and its standard error (NaN where there is none, which draws no bar)."""

    method: Method
    bits: float
    kl: float
    error: float


@dataclass(frozen=True, slots=True)
class Style:
    """How a family is drawn."""

    colour: str
    marker: str
    size: float
    width: float
    order: int
    weight: str


def write_plots(report: "RunReport", folder: Path) -> list[Path]:
    """Draw what the report has figures for, as PNG files in `folder`; returns their paths.

    `kl_against_bits.png`: mean KL against all-in bits, averaged over texts, a panel per context. `kl_by_context.png`: KL against context length, a
    panel per text, for two contexts or more. `agreement_by_depth.png`: share of needles found, methods by depth, a panel per length.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    written = []
    for name, draw in (("kl_against_bits", _draw_bits), ("kl_by_context", _draw_contexts), ("agreement_by_depth", _draw_depths)):
        with _settings():
            figure = draw(report)
            if figure is not None:
                path = folder / f"{name}.png"
                figure.savefig(path, dpi=DPI)
                written.append(path)
    return written


def require_matplotlib() -> None:
    """Raises ConfigError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError('plots need matplotlib, which is not installed; run: pip install "spectralquant[evaluate]"') from error


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(SETTINGS):  # pyright: ignore
        yield


def _new_figure(width: float, height: float) -> Any:
    """A figure on an Agg canvas of its own: no window, and the caller's pyplot is not touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # pyright: ignore
    FigureCanvasAgg(figure)
    return figure


# KL against bits ------------------------------------------------------------------------------------------------------


def _draw_bits(report: "RunReport") -> Any:
    panels = {context: points_of(report, context) for context in dict.fromkeys(line["context"] for line in report.language)}
    below, panels = _set_apart(panels)
    if not panels:
        return None
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    figure = _new_figure(2 + 6.2 * columns, 0.9 + 5.4 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    styles = family_styles(report.methods)
    for axes, (context, points) in zip(grid, panels.items(), strict=False):
        _plot_families(axes, points, styles)
        axes.set(title=f"{context:,} tokens of context", xlabel="bits per element, all-in")
        axes.tick_params(labelbottom=True)
    for axes in grid[::columns]:
        axes.set_ylabel("KL in nats per token")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    every = [point for points in panels.values() for point in points]
    _scale_bits(grid[0], [p.bits for p in every])
    _scale_kl(grid[0], every)
    _family_legend(figure, every, styles)
    _footnote(figure, report, below)
    _freeze_layout(figure)
    for axes, points in zip(grid, panels.values(), strict=False):
        _label_points(axes, points, styles)
    return figure


def points_of(report: "RunReport", context: int, text: str | None = None) -> list[Point]:
    """One point per method at a context length, averaged over texts (or of one text). A method that lacks one of the texts is left out: its mean
    would be another one."""
    lines = [line for line in report.language if line["context"] == context and text in (None, line["text"])]
    texts = {line["text"] for line in lines}
    points = []
    for method in report.methods:
        mine = [line for line in lines if line["method"] == method.name]
        if mine and {line["text"] for line in mine} == texts:
            bits, kl = (sum(line[key] for line in mine) / len(mine) for key in ("bits", "kl"))
            points.append(Point(method, bits, kl, math.sqrt(sum(line["kl_se"] ** 2 for line in mine)) / len(mine)))
    return [p for p in points if math.isfinite(p.kl) and p.kl > 0]  # a logarithmic axis has no place for others


def _set_apart(panels: dict[Any, list[Point]]) -> tuple[list[Point], dict[Any, list[Point]]]:
    """(the worst point of every 16-bit method, panels without them); nothing is set apart where no other point is left. Empty panels go."""
    sixteen = [p for points in panels.values() for p in points if p.bits >= 16]
    if len(sixteen) == sum(map(len, panels.values())):
        sixteen = []
    left = {key: [p for p in points if p not in sixteen] for key, points in panels.items()}
    worst = {p.method.name: p for p in sorted(sixteen, key=lambda p: p.kl)}
    return list(worst.values()), {key: points for key, points in left.items() if points}


def family_styles(methods: Sequence[Method]) -> dict[str, Style]:
    """Family -> style. Ours is set; the others take colours and markers in their order, so that both differ as long as they last."""
    others = [family for family in dict.fromkeys(method.family for method in methods) if family != OURS]
    styles = {f: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], 6.5, 1.3, 3, "normal") for i, f in enumerate(others)}
    return {**styles, OURS: Style(OUR_COLOUR, "o", 9, 2.6, 5, "bold")}


def _plot_families(axes: Any, points: Sequence[Point], styles: dict[str, Style]) -> None:
    for family, style in styles.items():
        mine = sorted((p for p in points if p.method.family == family), key=lambda p: p.bits)
        axes.plot([p.bits for p in mine], [p.kl for p in mine], color=style.colour, lw=style.width, zorder=style.order, alpha=0.85)
        for p in mine:
            axes.errorbar(p.bits, p.kl, p.error, zorder=style.order + 0.5, capsize=2.5, elinewidth=1.0, **_marker(p.method, style))


def _text_style(style: Style) -> dict[str, Any]:
    """The family's colour, a quarter darker: thin strokes look paler than lines."""
    from matplotlib.colors import to_rgb

    return {"fontsize": 9.5, "color": tuple(0.75 * c for c in to_rgb(style.colour)), "weight": style.weight}


def _marker(method: Method, style: Style) -> dict[str, Any]:
    """Hollow where codes are simulated."""
    face = "white" if method.simulated else style.colour
    return {"color": style.colour, "marker": style.marker, "ms": style.size, "mfc": face, "mec": style.colour, "mew": 1.5}


def _scale_bits(axes: Any, bits: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(min(bits) / 1.1, max(bits) * 1.1)
    axes.xaxis.set_major_locator(FixedLocator(BITS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _scale_kl(axes: Any, points: Iterable[Point]) -> None:
    """Limits come from the means, so that an error bar that reaches zero ends at the frame and does not stretch the axis."""
    from matplotlib.ticker import FuncFormatter

    kl = [p.kl for p in points]
    axes.set_yscale("log")
    axes.set_ylim(min(kl) / 1.8, max(kl) * 1.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _family_legend(figure: Any, points: Iterable[Point], styles: dict[str, Style]) -> None:
    from matplotlib.lines import Line2D

    first = {p.method.family: p.method for p in reversed(list(points))}
    families = sorted(first, key=lambda family: (family != OURS, list(styles).index(family)))
    handles = [Line2D([], [], label=f, lw=styles[f].width, **_marker(first[f], styles[f])) for f in families]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), max(int(figure.get_figwidth() / 2.1), 1)))


def _footnote(figure: Any, report: "RunReport", below: Sequence[Point]) -> None:
    parts = [report.config["plan"]["model"], "bars: standard error over windows"]
    if any(method.simulated for method in report.methods):
        parts.append("hollow: codes simulated, size counted")
    parts += [f"{p.method.label} (not shown): KL at most {p.kl:.1e}" for p in below]
    figure.supxlabel(textwrap.fill("; ".join(parts), int(12 * figure.get_figwidth())), fontsize=9, color=GREY)


# Labels ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in points of the figure (1/72 inch)."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: "Box") -> float:
        """Area in common."""
        return max(min(self.x1, other.x1) - max(self.x0, other.x0), 0.0) * max(min(self.y1, other.y1) - max(self.y0, other.y0), 0.0)

    def holds(self, x: float, y: float) -> bool:
        return self.x0 <= x <= self.x1 and self.y0 <= y <= self.y1

    @property
    def area(self) -> float:
        return (self.x1 - self.x0) * (self.y1 - self.y0)


GAPS = (3.0, 8.0, 15.0, 24.0, 36.0, 50.0)
"""Points between a marker and the nearest edge of its label, to be tried."""
DIRECTIONS = tuple((math.cos(math.tau * i / 16), math.sin(math.tau * i / 16)) for i in range(16))
LEADER = 10.0
"""Gap from which a thin line leads from the label to its point."""


def place_labels(anchors: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], frame: Box, ink: Sequence[tuple[float, float]]) -> list[Box]:
    """Boxes for labels of `sizes` near `anchors`, inside `frame`, clear of each other, of all anchors, and of `ink` as far as there is room.

    Greedy, then improved label by label until nothing moves; all in points.
    """
    markers = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]
    choices = [list(_candidates(anchor, size)) for anchor, size in zip(anchors, sizes, strict=True)]
    fixed = [[gap + _fixed_cost(box, frame, markers, ink) for gap, box in options] for options in choices]
    placed: list[Box | None] = [None] * len(anchors)
    for _ in range(8):
        before = list(placed)
        for i, options in enumerate(choices):
            others = [box for j, box in enumerate(placed) if box is not None and j != i]
            costs = [fixed[i][k] + 40 * sum(box.overlap(other) > 0 for other in others) for k, (_, box) in enumerate(options)]
            placed[i] = options[costs.index(min(costs))][1]
        if placed == before:
            break
    return [box for box in placed if box is not None]


def _candidates(anchor: tuple[float, float], size: tuple[float, float]) -> Iterator[tuple[float, Box]]:
    """(gap, box): the box slides around the anchor so that its edge is `gap` away."""
    (x, y), (width, height) = anchor, size
    for gap, (dx, dy) in product(GAPS, DIRECTIONS):
        cx, cy = x + dx * (gap + 5 + width / 2), y + dy * (gap + 5 + height / 2)
        yield gap, Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)


def _fixed_cost(box: Box, frame: Box, markers: Sequence[Box], ink: Sequence[tuple[float, float]]) -> float:
    outside = 1000.0 if box.overlap(frame) < 0.999 * box.area else 0.0
    return outside + 25 * sum(box.overlap(m) > 0 for m in markers) + 3 * sum(box.holds(x, y) for x, y in ink)


def _freeze_layout(figure: Any) -> None:
    """Let the layout settle, then keep it: labels are placed in pixels and must not move their axes."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _label_points(axes: Any, points: Sequence[Point], styles: dict[str, Style]) -> None:
    scale = 72 / axes.figure.dpi
    points = sorted(points, key=lambda p: (p.method.family != OURS, p.kl))
    anchors = [(x * scale, y * scale) for x, y in axes.transData.transform([(p.bits, p.kl) for p in points]).tolist()]
    texts = [axes.text(0, 0, p.method.name, **_text_style(styles[p.method.family])) for p in points]
    extents = [text.get_window_extent() for text in texts]
    sizes = [(e.width * scale + 2, e.height * scale) for e in extents]
    frame = axes.bbox
    boxes = place_labels(anchors, sizes, Box(frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale), _ink(axes, scale))
    for text, point, anchor, box in zip(texts, points, anchors, boxes, strict=True):
        text.remove()
        offset = ((box.x0 + box.x1) / 2 - anchor[0], (box.y0 + box.y1) / 2 - anchor[1])
        far = max(box.x0 - anchor[0], anchor[0] - box.x1, box.y0 - anchor[1], anchor[1] - box.y1) > LEADER
        axes.annotate(
            point.method.name, (point.bits, point.kl), offset, textcoords="offset points", ha="center", va="center", zorder=6,
            **_text_style(styles[point.method.family]),
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.7, "shrinkA": 0, "shrinkB": 5} if far else None,
        )  # fmt: skip


def _ink(axes: Any, scale: float) -> list[tuple[float, float]]:
    """Points every few points along the lines of `axes` (error bars come as line collections)."""
    paths = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    for collection in axes.collections:
        paths += [collection.get_transform().transform_path(path) for path in collection.get_paths()]
    ink = []
    for path in paths:
        corners = [(x * scale, y * scale) for x, y in path.vertices.tolist() if math.isfinite(x) and math.isfinite(y)]
        for (x0, y0), (x1, y1) in pairwise(corners):
            steps = int(math.hypot(x1 - x0, y1 - y0) / 3) + 1
            ink += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(min(steps, 400) + 1)]
    return ink


# KL by context --------------------------------------------------------------------------------------------------------


def _draw_contexts(report: "RunReport") -> Any:
    contexts = sorted({line["context"] for line in report.language})
    if len(contexts) < 2:
        return None
    texts = list(dict.fromkeys(line["text"] for line in report.language))
    panels = {(text, context): points_of(report, context, text) for text in texts for context in contexts}
    below, panels = _set_apart(panels)
    if not panels:
        return None
    count = len({p.method.name for points in panels.values() for p in points})
    figure = _new_figure(1.5 + 6 * len(texts), max(5.0, 1.8 + 0.24 * count))
    grid = figure.subplots(1, len(texts), sharex=True, sharey=True, squeeze=False)[0]
    styles = family_styles(report.methods)
    _scale_kl(grid[0], (p for points in panels.values() for p in points))
    labels = []
    for axes, text in zip(grid, texts, strict=True):
        curves: dict[str, list[tuple[int, Point]]] = {}
        for context in contexts:
            for point in panels.get((text, context), []):
                curves.setdefault(point.method.name, []).append((context, point))
        labels.append((axes, [_plot_curve(axes, curve, styles) for curve in curves.values()]))
        axes.set(title=text, xlabel="tokens of context", ylabel="KL in nats per token")
        axes.label_outer()
    _scale_contexts(grid[0], contexts)
    _footnote(figure, report, below)
    _freeze_layout(figure)
    for axes, texts_at_end in labels:
        _spread_labels(axes, texts_at_end, contexts[-1])
    return figure


def _plot_curve(axes: Any, curve: Sequence[tuple[int, Point]], styles: dict[str, Style]) -> tuple[Any, Point, int]:
    """Draw one method's line and its name right of the axes; returns the name's text, its point and the context there."""
    context, end = curve[-1]
    style = styles[end.method.family]
    x, y, error = [c for c, _ in curve], [p.kl for _, p in curve], [p.error for _, p in curve]
    axes.errorbar(x, y, error, lw=style.width, zorder=style.order, capsize=2.5, elinewidth=1.0, **_marker(end.method, style))
    transform = axes.get_yaxis_transform()  # x in shares of the axes, y in data
    text = axes.text(1.06, end.kl, end.method.name, transform=transform, va="center", **_text_style(style))
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


# Needles --------------------------------------------------------------------------------------------------------------


def _draw_depths(report: "RunReport") -> Any:
    cells = {(line["length"], line["method"], line["depth"]): line["accuracy"] for line in report.needles if line["kind"] is None}
    lengths = sorted({length for length, *_ in cells if length is not None})
    depths = sorted({depth for *_, depth in cells if depth is not None})
    names = list(dict.fromkeys(name for _, name, _ in cells))
    if not cells:
        return None
    figure = _new_figure(2.9 + len(lengths) * (0.72 * (len(depths) + 1) + 0.5), 1.5 + 0.36 * len(names))
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
