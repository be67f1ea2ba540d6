"""What `evaluation.speed` measured, over the length of the context."""

from collections.abc import Callable, Sequence
from typing import Any

from spectralquant.evaluation.plots.labels import end_label, freeze_layout, spread_ends
from spectralquant.evaluation.plots.style import COLOURS, COLUMN, OUR_COLOUR, Style, new_figure
from spectralquant.evaluation.speed import UNCOMPRESSED

Row = dict[str, Any]

MARKERS = "os^Dv"
STYLE = Style(COLOURS[-1], "X", 7, 2.0, 3, "normal")
"""Of the uncompressed cache."""


def draw_memory_by_context(rows: Sequence[Row]) -> Any:
    """Bytes of whole caches, that of the uncompressed one counted in 16 bits."""
    scale, unit = _unit(max(row["fp16_bytes"] for row in rows))
    return _draw(rows, lambda row: (row["fp16_bytes" if row["cache"] == UNCOMPRESSED else "cache_bytes"] / scale,) * 3, f"whole cache in {unit}")


def draw_speed_by_context(rows: Sequence[Row]) -> Any:
    """Tokens decoded per second: medians, with the least and the largest as bars."""
    return _draw(rows, lambda row: _spread_of(row, "tokens_per_s"), "tokens per second")


def draw_prompt_by_context(rows: Sequence[Row]) -> Any:
    """Seconds to the first token, as in `draw_speed_by_context`."""
    return _draw(rows, lambda row: _spread_of(row, "prompt_s"), "seconds to the first token")


def _draw(rows: Sequence[Row], figures: Callable[[Row], tuple[float, float, float]], name: str) -> Any:
    """A line per cache; `figures` gives a row's value, least and largest."""
    figure = new_figure(COLUMN, 3.9)
    axes = figure.subplots()
    ends, presets = [], [c for c in dict.fromkeys(row["cache"] for row in rows) if c != UNCOMPRESSED]
    for cache in dict.fromkeys(row["cache"] for row in rows):
        style = STYLE if cache == UNCOMPRESSED else Style(OUR_COLOUR, MARKERS[presets.index(cache) % len(MARKERS)], 6, 2.0, 5, "bold")
        mine = sorted((row for row in rows if row["cache"] == cache), key=lambda row: row["context"])
        x, values = [row["context"] for row in mine], [figures(row) for row in mine]
        bars = [[value - low for value, low, _ in values], [high - value for value, _, high in values]]
        y = [value for value, *_ in values]
        axes.errorbar(x, y, bars, color=style.colour, lw=style.width, marker=style.marker, ms=style.size, zorder=style.order, capsize=2.5, elinewidth=1.0)
        ends.append(end_label(axes, "FP16" if cache == UNCOMPRESSED else cache, x[-1], y[-1], style))
    axes.set(xlabel="tokens of context", ylabel=name, xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    freeze_layout(figure)
    spread_ends(axes, ends)
    return figure


def _spread_of(row: Row, name: str) -> tuple[float, float, float]:
    return row[name], row[f"{name}_low"], row[f"{name}_high"]


def _unit(largest: float) -> tuple[float, str]:
    return (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
