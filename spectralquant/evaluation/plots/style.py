"""What the pictures share: colours, a figure, points of methods and how families are drawn. matplotlib is imported when something is drawn."""

import math
import textwrap
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import Method

if TYPE_CHECKING:
    from spectralquant.evaluation.report import RunReport

OURS = "spectralquant"
"""The family that is drawn on top."""
OUR_COLOUR, GREY, LIGHT = "#D55E00", "#555555", "#DDDDDD"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#8A8A2A", "#332288", "#44AA99", "#606060")
"""Okabe and Ito's colours, which are told apart with any colour vision, ours taken out and a few of Tol's added. There is one marker more than
colours: a second round has other pairs."""
MARKERS = "s^Dv<>phdPX"
SIDE_COLOURS = {"key": COLOURS[0], "value": COLOURS[1]}
TAIL = "#BBBBBB"
BITS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11, "legend.fontsize": 10, "legend.frameon": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.edgecolor": "#999999", "axes.spines.top": False,
    "axes.spines.right": False, "xtick.color": "#444444", "ytick.color": "#444444", "text.parse_math": False,
}  # fmt: skip
DPI = 150
COLUMN = 4.6
"""Inches: the width of a figure that a phone shows whole with legible text."""


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


def require_matplotlib() -> None:
    """Raises ConfigError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError('plots need matplotlib, which is not installed; run: pip install "spectralquant[report]"') from error


@contextmanager
def settings() -> Generator[None]:
    import matplotlib

    with matplotlib.rc_context(SETTINGS):  # pyright: ignore
        yield


def new_figure(width: float, height: float) -> Any:
    """A figure on an Agg canvas of its own: no window, and the caller's pyplot is not touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # pyright: ignore
    FigureCanvasAgg(figure)
    return figure


def points_of(report: "RunReport", context: int, text: str | None = None) -> list[Point]:
    """One point per method at a context length, averaged over texts (or of one text). A method that lacks one of the texts is left out: its mean
    would be another one."""
    lines = [line for line in report.language if line["context"] == context and text in (None, line["text"])]
    texts = {line["text"] for line in lines}
    points: list[Point] = []
    for method in report.methods:
        mine = [line for line in lines if line["method"] == method.name]
        if mine and {line["text"] for line in mine} == texts:
            bits, kl = (sum(line[key] for line in mine) / len(mine) for key in ("bits", "kl"))
            points.append(Point(method, bits, kl, math.sqrt(sum(line["kl_se"] ** 2 for line in mine)) / len(mine)))
    return [p for p in points if math.isfinite(p.kl) and p.kl > 0]  # a logarithmic axis has no place for others


def set_apart(panels: dict[Any, list[Point]]) -> tuple[list[Point], dict[Any, list[Point]]]:
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


def plot_families(axes: Any, points: Sequence[Point], styles: dict[str, Style]) -> None:
    for family, style in styles.items():
        mine = sorted((p for p in points if p.method.family == family), key=lambda p: p.bits)
        axes.plot([p.bits for p in mine], [p.kl for p in mine], color=style.colour, lw=style.width, zorder=style.order, alpha=0.85)
        for p in mine:
            axes.errorbar(p.bits, p.kl, p.error, zorder=style.order + 0.5, capsize=2.5, elinewidth=1.0, **marker(p.method, style))


def text_style(style: Style) -> dict[str, Any]:
    return {"fontsize": 9.5, "color": text_colour(style.colour), "weight": style.weight}


def text_colour(colour: str) -> str:
    """`colour` a quarter darker: thin strokes look paler than lines."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = (0.75 * part for part in to_rgb(colour))
    return to_hex((red, green, blue))


def marker(method: Method, style: Style) -> dict[str, Any]:
    """Hollow where codes are simulated."""
    face = "white" if method.simulated else style.colour
    return {"color": style.colour, "marker": style.marker, "ms": style.size, "mfc": face, "mec": style.colour, "mew": 1.5}


def scale_bits(axes: Any, bits: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(min(bits) / 1.1, max(bits) * 1.1)
    axes.xaxis.set_major_locator(FixedLocator(BITS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def scale_kl(axes: Any, points: Iterable[Point]) -> None:
    """Limits come from the means, so that an error bar that reaches zero ends at the frame and does not stretch the axis."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    kl = [p.kl for p in points]
    axes.set_yscale("log")
    axes.set_ylim(min(kl) / 1.8, max(kl) * 1.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))  # where less than a decade shows; the default writes mathematics


def family_legend(figure: Any, points: Iterable[Point], styles: dict[str, Style]) -> None:
    from matplotlib.lines import Line2D

    first = {p.method.family: p.method for p in reversed(list(points))}
    families = sorted(first, key=lambda family: (family != OURS, list(styles).index(family)))
    handles = [Line2D([], [], label=f, lw=styles[f].width, **marker(first[f], styles[f])) for f in families]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), max(int(figure.get_figwidth() / 2.1), 1)))


def footnote(figure: Any, report: "RunReport", below: Sequence[Point]) -> None:
    parts = [report.config["plan"]["model"], "bars: standard error over windows"]
    if any(method.simulated for method in report.methods):
        parts.append("hollow: codes simulated, size counted")
    parts += [f"{p.method.label} (not shown): KL at most {p.kl:.1e}" for p in below]
    figure.supxlabel(textwrap.fill("; ".join(parts), int(12 * figure.get_figwidth())), fontsize=9, color=GREY)
