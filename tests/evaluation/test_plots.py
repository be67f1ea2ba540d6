"""Plots: what is drawn of hand-made runs, and that labels keep clear of each other."""

import builtins
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hand_made import METHODS, language_row, language_rows, needle_rows, write_run

from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import METHODS as ALL_METHODS
from spectralquant.evaluation.plots import write_plots
from spectralquant.evaluation.plots.labels import Box, place_labels, spread
from spectralquant.evaluation.plots.style import family_styles, points_of
from spectralquant.evaluation.report import build_report

plotting = pytest.importorskip("matplotlib")


def plot(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    return write_plots(build_report(write_run(folder, rows)), folder)


def pixels(path: Path) -> Any:
    """[height, width, 4]; raises for a file that is no PNG."""
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)


def test_all_plots_of_a_full_run(tmp_path: Path) -> None:
    rows = [*language_rows(("prose", "code"), (512, 2048)), *needle_rows({"fp16": [(1024, 0.0)], "high": [(4096, 0.5)]})]
    paths = plot(tmp_path, rows)
    assert [path.name for path in paths] == ["kl_against_bits.png", "kl_by_context.png", "agreement_by_depth.png"]
    assert sorted(tmp_path.glob("*.png")) == sorted(paths)
    for path in paths:
        image = pixels(path)
        assert min(image.shape[:2]) > 250
        assert 0.001 < (image[..., :3].min(-1) < 0.9).mean() < 0.8  # ink, and not ink alone


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    assert [p.name for p in plot(tmp_path / "a", language_rows())] == ["kl_against_bits.png"]
    assert [p.name for p in plot(tmp_path / "b", needle_rows({"high": [(1024, 0.0)]}))] == ["agreement_by_depth.png"]
    assert plot(tmp_path / "c", []) == []


def test_a_run_with_one_window_or_the_yardstick_alone(tmp_path: Path) -> None:
    assert len(plot(tmp_path / "a", [language_row(m) for m in METHODS])) == 1
    assert len(plot(tmp_path / "b", language_rows(methods=("fp16",)))) == 1


def test_zero_divergence_has_no_place_on_a_logarithmic_axis(tmp_path: Path) -> None:
    rows = [{**row, "kl": [0.0] * 4} if row["method"] == "high" else row for row in language_rows()]
    report = build_report(write_run(tmp_path, rows))
    assert [p.method.name for p in points_of(report, 512)] == ["fp16", "kivi2-g32"]
    assert len(write_plots(report, tmp_path)) == 1
    assert plot(tmp_path / "all", [{**row, "kl": [0.0] * 4} for row in language_rows(contexts=(512, 2048))]) == []


def test_points_average_over_texts(tmp_path: Path) -> None:
    rows = language_rows(("prose", "code"))
    for row in rows:
        if row["text"] == "code":
            row.update(kl=[3 * k for k in row["kl"]], bits=row["bits"] + 1)
    rows = [row for row in rows if (row["method"], row["text"]) != ("kivi2-g32", "code")]
    report = build_report(write_run(tmp_path, rows))
    points = {p.method.name: p for p in points_of(report, 512)}
    assert set(points) == {"fp16", "high"}  # KIVI's mean would be of another text
    assert points["high"].kl == pytest.approx((0.0375 + 3 * 0.0375) / 2) and points["high"].bits == 3.0
    assert points["high"].error == pytest.approx(math.hypot(0.0125, 3 * 0.0125) / 2)
    assert {p.method.name for p in points_of(report, 512, "prose")} == set(METHODS)


def test_pyplot_and_settings_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    before = dict(plotting.rcParams)
    plot(tmp_path, language_rows(contexts=(512, 2048)))
    assert dict(plotting.rcParams) == before


def test_missing_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = build_report(write_run(tmp_path, language_rows()))
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r'pip install "spectralquant\[report\]"'):
        write_plots(report, tmp_path)


def test_families_look_different() -> None:
    styles = family_styles(list(ALL_METHODS.values()))
    assert set(styles) == {method.family for method in ALL_METHODS.values()}
    looks = [(style.colour, style.marker) for style in styles.values()]
    assert len(set(looks)) == len(looks)
    ours = styles.pop("spectralquant")
    assert all(ours.order > other.order and ours.width > other.width and ours.colour != other.colour for other in styles.values())


@pytest.mark.parametrize("seed", range(5))
def test_labels_keep_clear_where_there_is_room(seed: int) -> None:
    rng = random.Random(seed)
    frame = Box(0, 0, 500, 350)
    anchors = [(rng.uniform(10, 490), rng.uniform(10, 340)) for _ in range(16)]
    anchors[1:4] = [(anchors[0][0] + d, anchors[0][1] + d) for d in (3, 6, 9)]  # a cluster
    sizes = [(rng.uniform(20, 60), 12) for _ in anchors]
    boxes = place_labels(anchors, sizes, frame, [])
    assert all(a.overlap(b) == 0 for a, b in itertools.combinations(boxes, 2))
    assert not any(box.holds(*anchor) for box in boxes for anchor in anchors)
    for box, size, anchor in zip(boxes, sizes, anchors, strict=True):
        assert (box.x1 - box.x0, box.y1 - box.y0) == pytest.approx(size)
        assert box.overlap(frame) == pytest.approx(box.area)
        assert math.dist(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2), anchor) < 60 + max(size)


def test_a_label_avoids_lines() -> None:
    right = [(100.0 + i, 100.0 + dy) for i in range(60) for dy in (-3, 0, 3)]
    free, moved = (place_labels([(100, 100)], [(40, 12)], Box(0, 0, 200, 200), ink)[0] for ink in ([], right))
    assert any(free.holds(*p) for p in right) and not any(moved.holds(*p) for p in right)


def test_spread_is_the_nearest_arrangement() -> None:
    """Against brute force over a grid."""
    wanted, gap = [1.0, 1.5, 2.0, 6.0], 2.0
    got = spread(wanted, gap, -100, 100)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(got))
    grid = [x / 2 for x in range(-4, 19)]
    legal = (p for p in itertools.product(grid, repeat=4) if all(b - a >= gap for a, b in itertools.pairwise(p)))
    best = min(sum((a - b) ** 2 for a, b in zip(p, wanted, strict=True)) for p in legal)
    assert sum((a - b) ** 2 for a, b in zip(got, wanted, strict=True)) <= best + 1e-9


def test_spread_stays_in_its_bounds() -> None:
    assert spread([9.0, 9.5, 10.0], 2.0, 0.0, 10.0) == [6.0, 8.0, 10.0]
    assert spread([0.0, 0.0], 2.0, 0.0, 10.0) == [0.0, 2.0]
    assert spread([], 2.0, 0.0, 10.0) == []
