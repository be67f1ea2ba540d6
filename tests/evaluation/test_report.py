"""Reports of hand-made runs: every figure is known beforehand."""

import builtins
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hand_made import METHODS, SCALE, language_row, language_rows, needle_row, needle_rows, problem_row, write_run
from rich.console import Console

from spectralquant.errors import ConfigError
from spectralquant.evaluation.metrics import wilson_interval
from spectralquant.evaluation.report import RunReport, build_report, select_needles, write_report


def find(lines: Any, **where: Any) -> dict[str, Any]:
    """The only line with these columns."""
    found = [line for line in lines if all(line[k] == v for k, v in where.items())]
    assert len(found) == 1
    return found[0]


def table(markdown: str, title: str) -> dict[str, dict[str, str]]:
    """A table of the document: method -> column -> cell (the first of columns with one name)."""
    section = markdown.split(f"## {title}\n")[1].split("\n## ")[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(reversed(header), reversed(row), strict=True)) for row in rows}


def test_language_figures(tmp_path: Path) -> None:
    line = find(build_report(write_run(tmp_path, language_rows())).language, method="high")
    assert line["text"] == "prose" and line["context"] == 512
    assert line["windows"] == 2 and line["tokens"] == 8
    assert line["kl"] == pytest.approx(0.0375)  # windows of 0.025 and 0.05
    assert line["kl_se"] == pytest.approx(0.0125)
    assert line["agreement"] == 0.75
    # Excess likelihoods per window: 0.5 and, with three targets dearer by 1 in the last, (0.5 + 0.5 - 0.5) / 3.
    assert line["perplexity_ratio"] == pytest.approx(math.exp((0.5 + 0.5 / 3) / 2))
    assert (line["bits"], line["ratio"]) == (2.5, 6.4)
    assert (line["whole_bits"], line["whole_ratio"]) == (9.25, pytest.approx(16 / 9.25))


def test_one_line_per_text_context_and_method_in_the_plan_s_order(tmp_path: Path) -> None:
    rows = language_rows(("prose", "code"), (512, 2048))
    report = build_report(write_run(tmp_path, rows, ("high", "fp16", "kivi2-g32")))
    want = [(t, c, m) for t in ("prose", "code") for c in (512, 2048) for m in ("high", "fp16", "kivi2-g32")]
    assert [(line["text"], line["context"], line["method"]) for line in report.language] == want
    assert [method.name for method in report.methods] == ["high", "fp16", "kivi2-g32"] and report.yardstick == "high"


def test_methods_that_the_plan_has_dropped_come_last(tmp_path: Path) -> None:
    report = build_report(write_run(tmp_path, language_rows(methods=("standard", *METHODS)), ("high", "max")))
    assert [method.name for method in report.methods] == ["high", "standard", "fp16", "kivi2-g32"]


def test_interrupted_run(tmp_path: Path) -> None:
    rows = [*language_rows(), language_row("fp16", "code")]
    rows.remove(language_row("high", window=1))
    folder = write_run(tmp_path, rows)
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"task": "language", "uni')
    report = build_report(folder)
    assert find(report.language, text="prose", method="high")["windows"] == 1
    assert find(report.language, text="prose", method="fp16")["windows"] == 2
    assert [line["method"] for line in report.language if line["text"] == "code"] == ["fp16"]
    markdown = report.as_markdown()
    cells = table(markdown, "prose, 512 tokens of context")
    assert cells["spectralquant high"]["windows"] == "1" and cells["FP16 †"]["windows"] == "2"
    assert cells["spectralquant high"]["KL"] == "0.025"  # one window has no standard error
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["language"][2]["kl_se"] is None


def test_needles_by_group(tmp_path: Path) -> None:
    everywhere = [(length, depth) for length in (1024, 4096) for depth in (0.0, 0.5)]
    rows = needle_rows({"fp16": everywhere, "high": [(1024, 0.0), (1024, 0.5), (4096, 0.5)], "kivi2-g32": []})
    report = build_report(write_run(tmp_path, rows))
    mine = [line for line in report.needles if line["method"] == "high"]
    shares = {(line["length"], line["depth"], line["kind"]): (line["accuracy"], line["units"]) for line in mine}
    assert shares == {
        (None, None, None): (0.75, 8), (1024, None, None): (1.0, 4), (4096, None, None): (0.5, 4), (None, 0.0, None): (0.5, 4),
        (None, 0.5, None): (1.0, 4), (None, None, "sentence"): (0.75, 8), (1024, 0.0, None): (1.0, 2), (1024, 0.5, None): (1.0, 2),
        (4096, 0.0, None): (0.0, 2), (4096, 0.5, None): (1.0, 2),
    }  # fmt: skip
    overall = find(select_needles(report.needles), method="high")
    assert (overall["accuracy_low"], overall["accuracy_high"]) == pytest.approx(wilson_interval(6, 8))
    assert overall["difference"] == -0.25
    assert overall["difference_se"] == pytest.approx(math.sqrt((6 * 0.25**2 + 2 * 0.75**2) / 7 / 8))
    assert overall["answer_nll"] == pytest.approx(0.625)


def test_differences_are_paired_on_shared_needles(tmp_path: Path) -> None:
    rows = [needle_row("fp16", right, sample=i) for i, right in enumerate((1, 1, 0))]
    rows += [needle_row("high", right, sample=i) for i, right in ((1, 0), (2, 0), (3, 1))]
    line = find(select_needles(build_report(write_run(tmp_path, rows)).needles), method="high")
    assert line["difference"] == -0.5  # samples 1 and 2; by overall shares it would be -1/3
    alone = find(select_needles(build_report(write_run(tmp_path / "alone", rows[3:])).needles), method="high")
    assert math.isnan(alone["difference"]) and alone["units"] == 3


def test_needle_tables(tmp_path: Path) -> None:
    everywhere = [(length, depth) for length in (1024, 4096) for depth in (0.0, 0.5)]
    rows = needle_rows({"fp16": everywhere, "high": [(1024, 0.0), (1024, 0.5), (4096, 0.5)]})
    rows = [row for row in rows if not (row["method"] == "high" and row["depth"] == 0.5)]
    markdown = build_report(write_run(tmp_path, rows)).as_markdown()
    low, high = (round(100 * x) for x in wilson_interval(2, 4))
    cells = table(markdown, "Needles")["spectralquant high"]
    assert cells["needles"] == "4" and cells["found"] == "50.0 %" and cells["95 % interval"] == f"{low} to {high}"
    assert cells["against FP16"].startswith("-50.0 ± 28.9") and table(markdown, "Needles")["FP16 †"]["against FP16"] == "-"
    assert cells["1,024 tokens"] == "100.0 %" and cells["4,096 tokens"] == "0.0 %" and cells["sentence"] == "50.0 %"
    depths = table(markdown, "Needles by depth")["spectralquant high"]
    assert depths["0 %"] == f"50.0 % ({low} to {high})" and depths["50 %"] == "-"


def test_problems_are_counted_one_by_one(tmp_path: Path) -> None:
    rows = [problem_row("fp16", [1, 1, 1], [1, 1, 0]), problem_row("high", [1, 0, 1], [1, 0, 0]), problem_row("high", [0], [0], batch=1)]
    report = build_report(write_run(tmp_path, rows))
    line = find(report.problems, method="high")
    assert (line["units"], line["accuracy"], line["accuracy_strict"]) == (4, 0.5, 0.25)
    assert line["difference"] == pytest.approx(-1 / 3)  # three shared problems
    cells = table(report.as_markdown(), "Word problems")["spectralquant high"]
    assert cells["problems"] == "4" and cells["right"] == "50.0 %" and cells["right after ####"] == "25.0 %"
    assert cells["against FP16"] == "-33.3 ± 33.3"


def test_markdown_of_language(tmp_path: Path) -> None:
    markdown = build_report(write_run(tmp_path, language_rows(("prose", "code")))).as_markdown()
    assert markdown.startswith("# tiny\n\nfloat32, cpu, 2 threads, Python 3.11.7, torch 2.13.0; 2 windows of 4 scored tokens")
    assert "`spectralquant evaluate --out run`" in markdown and "hqq" not in markdown
    for text in ("prose", "code"):
        cells = table(markdown, f"{text}, 512 tokens of context")
        assert list(cells) == ["FP16 †", "KIVI 2-bit, groups of 32 †", "spectralquant high"]
        ours = cells["spectralquant high"]
        assert ours["bits"] == "2.50" and ours["whole cache"] == "9.25" and ours["ratio"] == "6.40x"
        assert ours["KL"] == "0.0375 ± 0.013" and ours["median"] == "0.03" and ours["same token"] == "75.0 %"
        assert ours["perplexity ratio"].startswith("1.3956 ± 0.23")
    assert markdown.count("† codes simulated, size counted") == 2


def test_no_dagger_where_all_codes_are_real(tmp_path: Path) -> None:
    report = build_report(write_run(tmp_path, language_rows(methods=("high",)), ("high",)))
    assert "†" not in report.as_markdown()


def test_print_shows_every_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*language_rows(), *needle_rows({"fp16": [(1024, 0.0)], "high": []}), problem_row("fp16", [1], [1])]
    build_report(write_run(tmp_path, rows)).print(Console(width=200))
    shown = capsys.readouterr().out
    for title in ("prose, 512 tokens of context", "Needles by depth", "Word problems"):
        assert title in shown
    assert "0.0375 ± 0.013" in shown and "codes simulated, size counted" in shown and "9.25" in shown


def test_written_files(tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path, language_rows()))
    assert isinstance(report, RunReport)
    document = json.loads((tmp_path / "report.json").read_text())
    assert list(document) == ["config", "methods", "yardstick", "language", "needles", "problems"]
    assert document["config"] == json.loads((tmp_path / "config.json").read_text())
    assert document["methods"][1] == {"name": "kivi2-g32", "label": "KIVI 2-bit, groups of 32", "family": "KIVI, groups of 32", "simulated": True}
    assert [line["kl"] for line in document["language"]] == pytest.approx([3.75 * SCALE[m] for m in METHODS])
    assert (tmp_path / "report.md").read_text() == report.as_markdown()
    assert (tmp_path / "kl_against_bits.png").is_file()


def test_tables_are_written_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "matplotlib")
    with pytest.raises(ConfigError, match=r'pip install "spectralquant\[report\]"'):
        write_report(write_run(tmp_path, language_rows()))
    assert (tmp_path / "report.json").is_file() and (tmp_path / "report.md").is_file() and not list(tmp_path.glob("*.png"))


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        build_report(tmp_path)


def test_a_run_without_rows(tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path, []))
    assert report.methods == report.language == report.needles == report.problems == ()
    assert report.as_markdown().startswith("# tiny") and not list(tmp_path.glob("*.png"))


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Importing `package` fails, whether it was imported before or not."""
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
