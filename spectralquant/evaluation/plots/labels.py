"""Names beside their points, where they cover neither each other nor what is drawn."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from spectralquant.evaluation.plots.style import OURS, Point, Style, text_style


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


def freeze_layout(figure: Any) -> None:
    """Let the layout settle, then keep it: labels are placed in pixels and must not move their axes."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def label_points(axes: Any, points: Sequence[Point], styles: dict[str, Style]) -> None:
    scale = 72 / axes.figure.dpi
    points = sorted(points, key=lambda p: (p.method.family != OURS, p.kl))
    anchors = [(x * scale, y * scale) for x, y in axes.transData.transform([(p.bits, p.kl) for p in points]).tolist()]
    texts = [axes.text(0, 0, p.method.name, **text_style(styles[p.method.family])) for p in points]
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
            **text_style(styles[point.method.family]),
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.7, "shrinkA": 0, "shrinkB": 5} if far else None,
        )  # fmt: skip


def _ink(axes: Any, scale: float) -> list[tuple[float, float]]:
    """Points every few points along the lines of `axes` (error bars come as line collections)."""
    paths = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    for collection in axes.collections:
        paths += [collection.get_transform().transform_path(path) for path in collection.get_paths()]
    ink: list[tuple[float, float]] = []
    for path in paths:
        corners = [(x * scale, y * scale) for x, y in path.vertices.tolist() if math.isfinite(x) and math.isfinite(y)]
        for (x0, y0), (x1, y1) in pairwise(corners):
            steps = int(math.hypot(x1 - x0, y1 - y0) / 3) + 1
            ink += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(min(steps, 400) + 1)]
    return ink


@dataclass(frozen=True, slots=True)
class EndLabel:
    """A name right of the axes, and the end (x, y) of its line, in data."""

    text: Any
    x: float
    y: float


def end_label(axes: Any, name: str, x: float, y: float, style: Style) -> EndLabel:
    """Write the name of a line that ends at (x, y); `spread_ends` finds its place when the layout has settled."""
    transform = axes.get_yaxis_transform()  # x in shares of the axes, y in data
    return EndLabel(axes.text(1.06, y, name, transform=transform, va="center", **text_style(style)), x, y)


def spread_ends(axes: Any, ends: Sequence[EndLabel]) -> None:
    """Move the names apart and join each to its line's end."""
    gap = 12.5 * axes.figure.dpi / 72
    to_pixels, to_data, to_share, mixed = axes.transData, axes.transData.inverted(), axes.transAxes.inverted(), axes.get_yaxis_transform()
    ends = sorted(ends, key=lambda e: float(to_pixels.transform((e.x, e.y))[1]))
    wanted = [float(to_pixels.transform((e.x, e.y))[1]) for e in ends]
    for end, y in zip(ends, spread(wanted, gap, axes.bbox.y0, axes.bbox.y1), strict=True):
        height = float(to_data.transform((0, y))[1])
        end.text.set_y(height)
        share = float(to_share.transform(to_pixels.transform((end.x, end.y)))[0])
        line = [share + 0.012, 1.0, 1.05], [end.y, end.y, height]
        axes.plot(*line, transform=mixed, clip_on=False, lw=0.7, color=end.text.get_color(), alpha=0.6)


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
