"""Figures of the pages are those of the result files, as rounded there, or what a script computes; options are those that there are, and the picture of the
layers shows the layers."""

import html
import importlib
import json
import re
import sys
from dataclasses import fields
from statistics import mean
from typing import Any

import pytest
from blocks import ROOT

from spectralquant.integrations.vllm.options import Options
from spectralquant.integrations.vllm.plugin import NEWEST, OLDEST

Table = list[list[str]]
FILES = {"Qwen2.5-Coder-1.5B": "evaluation-qwen-2048", "SmolLM2-135M": "evaluation-smollm2-1024", "Gemma 3 270M": "evaluation-gemma3-1024"}
"""Model as pages call it -> what was measured."""


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def tables(page: str, first: str) -> list[tuple[str, Table]]:
    """(what stands before it, rows without bold marks) of every table on `page` whose header begins with the cells `first`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [m for m in re.finditer(r"(?:^\|.*\|\n)+", text, re.MULTILINE) if m[0].startswith(f"| {first} |")]
    assert found, f"{page} has no table that begins with {first}"
    return [(text[: m.start()], [[cell.strip().strip("*`") for cell in line.strip("|").split("|")] for line in m[0].splitlines()]) for m in found]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


@pytest.mark.parametrize(("page", "rows"), [("README.md", [7]), ("docs/quality.md", [13, 20, 5])])
def test_tables_of_quality(page: str, rows: list[int]) -> None:
    found = tables(page, "cache | bits")
    assert [len(table) - 2 for _, table in found] == rows
    for before, table in found:
        report = result(FILES[max(FILES, key=before.rfind)])
        labels = {m["label"]: m["name"] for m in report["methods"]}
        figures = {(line["text"], line["method"]): line for line in report["language"]}
        names = [name.removeprefix("KL, ") for name in table[0] if name.startswith("KL, ")]
        assert len(names) == 3
        for label, bits, *kl, agree, ratio in table[2:]:
            lines = [figures[text, labels[label]] for text in names]
            assert kl == [f"{line['kl']:.4f}" for line in lines]
            assert (bits, agree) == (f"{mean(line['bits'] for line in lines):.2f}", percent(mean(line["agreement"] for line in lines)))
            assert ratio == f"{mean(line['perplexity_ratio'] for line in lines):.3f}"


def test_mutated_files() -> None:
    """No file failed, or the page would have to say so."""
    rows = {row["reader"]: row for row in result("fuzz-readers")["rows"]}
    ((_, table),) = tables("docs/reliability.md", "reader | files | as it was")
    assert {name for name, *_ in table[2:]} == set(rows)
    for name, *cells in table[2:]:
        row, outcomes = rows[name], rows[name]["outcomes"]
        refused = sum(count for outcome, count in outcomes.items() if outcome.startswith("refused "))
        counts = [row["files"], outcomes.get("same", 0), refused, outcomes.get("other", 0), row["failed"]]
        assert sum(counts[1:]) == counts[0] and row["failed"] == 0
        assert cells == [*(f"{n:,}" for n in counts), f"{row['slowest_seconds']:.2f} s", f"{row['grown_bytes'] / 1e6:.0f} MB"]


def test_files_that_coverage_led_to() -> None:
    rows = {row["reader"]: row for row in result("fuzz-coverage")["rows"]}
    ((_, table),) = tables("docs/reliability.md", "reader | inputs | branches at first")
    assert {name for name, *_ in table[2:]} == set(rows)
    for name, *cells in table[2:]:
        row = rows[name]
        assert cells == [f"{row[column]:,}" for column in ("inputs", "branches_of_the_corpus", "branches", "failed")] and row["failed"] == 0


def test_what_presets_cost() -> None:
    """Means over three texts, of two models."""
    ((_, table),) = tables("docs/presets.md", "preset | SmolLM2: bits")
    for name, *cells in table[2:]:
        want = []
        for file in ("evaluation-smollm2-1024", "evaluation-qwen-2048"):
            lines = [line for line in result(file)["language"] if line["method"] == name]
            bits, kl, agreement = (mean(line[part] for line in lines) for part in ("bits", "kl", "agreement"))
            want += [f"{bits:.2f}", f"{kl:.4f}", percent(agreement)]
        assert cells == want, name
    assert len(table) == 6


def test_languages() -> None:
    ((_, table),) = tables("docs/quality.md", "model | cache | finnish")
    for model, label, *cells in table[2:]:
        report = result(f"evaluation-{'qwen' if model.startswith('Qwen') else 'smollm2'}-languages")
        name = next(m["name"] for m in report["methods"] if m["label"] == label)
        kl = {line["text"]: line["kl"] for line in report["language"] if line["method"] == name}
        assert cells == [f"{kl[language]:.4f}" for language in table[0][2:]]
    assert len(table) == 10


@pytest.mark.parametrize("page", ["docs/quality.md", "docs/presets.md", "docs/faq.md"])
def test_long_contexts(page: str) -> None:
    """What pages say about `high` and KIVI at 2,048 and 32,768 tokens."""
    lines, text = result("evaluation-qwen-long")["language"], (ROOT / page).read_text(encoding="utf-8")
    for method, contexts in (("high", (2048, 32768)), ("kivi4-g128", (2048, 32768)), ("standard", (32768,))):
        for context in contexts:
            figure = f"{mean(line['kl'] for line in lines if (line['method'], line['context']) == (method, context)):.4f}"
            said = figure in text or (method == "standard" and page == "docs/quality.md") or (context == 2048 and page == "docs/faq.md")
            assert said, f"{page}: {method} at {context} measures {figure}"


def test_memory_on_a_cpu() -> None:
    """The table of whole caches, and what other pages take from it."""
    ((_, table),) = tables("docs/performance.md", "tokens | preset")
    rows = result("memory-smollm2-cpu")["rows"]
    assert table[2:] == [[f"{r['tokens']:,}", r["preset"], f"{r['ratio']:.2f}x", f"{r['ratio_with_codec']:.2f}x", f"{r['relative_speed']:.2f}x"] for r in rows]
    high = [f"{r['ratio']:.1f}" for r in rows if r["preset"] == "high"]
    for page in ("README.md", "docs/presets.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert re.search(rf"{high[0]} times as small at 540 tokens|540 tokens SmolLM2's whole cache is {high[0]} times", text), page
        assert f"{high[1]} times" in text and f"{high[2]} times" in text, page
    slowest, fastest = min(r["relative_speed"] for r in rows), max(r["relative_speed"] for r in rows)
    for page in ("docs/index.md", "docs/presets.md", "docs/faq.md"):
        assert f"{slowest:.2f} to {fastest:.2f} times" in (ROOT / page).read_text(encoding="utf-8"), page


def test_what_the_home_page_says() -> None:
    text, lines = (ROOT / "docs/index.md").read_text(encoding="utf-8"), result("evaluation-qwen-2048")["language"]
    for method in ("high", "kivi4-g128"):
        kl, bits = (mean(line[part] for line in lines if line["method"] == method) for part in ("kl", "bits"))
        assert f"{kl:.4f}" in text and f"{bits:.2f} bits" in text


def test_needles_and_problems() -> None:
    needles = {n["method"]: n for n in result("evaluation-qwen-needles")["needles"] if n["length"] is None and n["depth"] is None and n["kind"] is None}
    found = {method: round(n["accuracy"] * n["units"]) for method, n in needles.items()}
    assert all(found[m] == 59 for m in ("fp16", "standard", "high", "ultra")) and found["kivi2-g32"] == 57
    solved = {p["method"]: p for p in result("evaluation-qwen-problems")["problems"]}
    shares = {method: f"{100 * p['accuracy']:.0f} %" for method, p in solved.items()}
    text = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    low, high = (100 * solved["fp16"][f"accuracy_{end}"] for end in ("low", "high"))
    assert f"FP16 solves {shares['fp16']} (95 % interval {low:.0f} to {high:.0f})" in text
    assert shares["high"] == shares["standard"] == "46 %" and shares["ultra"] == "45 %"


@pytest.mark.parametrize(("first", "function"), [("part of a page", "table_of_a_page"), ("model | cards", "table_of_users")])
def test_sizes_of_a_server(first: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What benchmarks/serving_sizes.py prints."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("serving_sizes", "shapes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    rows = getattr(importlib.import_module("serving_sizes"), function)()
    ((_, table),) = tables("docs/serving.md", first)
    assert [table[0], *table[2:]] == [[cell.strip("`") for cell in row] for row in rows]


def test_options_of_a_server() -> None:
    """All of them, with their defaults, and the window of releases."""
    ((_, table),) = tables("docs/serving.md", "option | default")
    assert [row[:2] for row in table[2:]] == [[f.name, json.dumps(f.default)] for f in fields(Options)]
    window = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
    assert f"works with vLLM {window}:" in (ROOT / "docs/serving.md").read_text(encoding="utf-8")


def test_figures_of_a_server() -> None:
    measured, text = result("serving-smollm2-cpu"), (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    capacity = measured["capacity"]
    assert f"| {capacity['stock']:,} | {capacity['packed']:,}, {capacity['ratio']:.2f}x |" in text
    for row in measured["compared"].values():
        cells = f"| {row['equal']} of {row['answers']} | {row['tokens_before_the_first_difference']:,}"
        assert cells in text
    seconds = [measured["cases"][name]["seconds"][i] for name, i in (("stock", 0), ("packed", 0), ("packed, asked twice", 1))]
    assert "took {:.0f} s as vLLM is, {:.0f} s packed, {:.0f} s when asked again".format(*seconds) in text


def test_figures_of_pages() -> None:
    rows = {(row["batch"], row["context"], row["used"]): row for row in result("paged-h200")["attention"]}
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    for batch, context in {key[:2] for key in rows}:
        none, one, four = (rows[batch, context, used]["us"] for used in (0, 1, 4))
        plain = rows[batch, context, 0]
        cells = " | ".join(f"{us:.0f}" for us in (plain["sdpa_us"], plain["contiguous_us"], none, one, four))
        assert f"| {8 * batch} x {context:,} | {cells} |" in text


def test_the_page_of_encoders() -> None:
    rows = result("encoder-memory-cpu")["rows"]
    text = (ROOT / "docs/encoders.md").read_text(encoding="utf-8")
    for row, label in zip((rows[0], rows[1], rows[3]), ("logits in full", "`scaled_dot_product_attention`", "coded, `high`"), strict=True):
        assert f"| {label} | {row['peak_bytes'] / 1e6:,.0f} MB | {row['held_bytes'] / 1e6:.1f} MB |" in text
    trained = result("encoders-cpu")
    labels = {"standard": "`standard`", "high": "`high`, `max`", "8 bits": "8 bits"}
    for row in trained["summary"]:
        same = "high" if row["setting"] == "max" else row["setting"]  # the page says that they are
        assert row["seeds"] == 5
        low, high = (f"{100 * row['accuracy_difference'][end]:.2f}".replace("-0.00", "0.00") for end in ("low", "high"))
        accuracy, figures = f"{100 * row['accuracy_uncoded']['mean']:.1f} %", f"{row['cosine']['mean']:.4f} | {row['kl']['mean']:.5f} |"
        assert re.search(rf"\| {re.escape(labels[same])} \| {accuracy} \| \S+ \({low} to {high}\) \| {re.escape(figures)}", text)
    differences = [end for claim in trained["claims"] for end in claim["accuracy_difference"].values()]
    assert not any(d["low"] > 0 for d in differences), "the page says that nothing improves"


def test_the_picture_of_the_layers_is_that_of_the_contract() -> None:
    """All modules, from top to bottom as in .importlinter; `python docs/figures.py --only architecture` draws it anew."""
    contract = (ROOT / ".importlinter").read_text(encoding="utf-8").split("layers =\n")[1].split("\n\n")[0]
    want = [name.strip().removeprefix("spectralquant.") for line in contract.splitlines() for name in line.split("|")]
    texts = [html.unescape(t) for t in re.findall(r"<text[^>]*>([^<]*)</text>", (ROOT / "docs/images/architecture.svg").read_text(encoding="utf-8"))]
    assert [t for t in texts if t in want] == want


def test_table_of_archives() -> None:
    lines = {line["method"]: line for line in result("archive-smollm2")["summary"]}
    ((_, table),) = tables("docs/archive.md", "stored | times smaller")
    names = {"packed cache, `high": "high", "lossless": "lossless", **{f"archive`, rate {rate}": f"archive {rate}" for rate in (-4, 0, 4, 8)}}

    def kl(method: str) -> str:
        return f"{lines[method]['kl']:.4f} ± {lines[method]['kl_se']:.4f}"

    assert len(table) - 2 == len(names)
    for label, ratio, divergence, agree, loaded in table[2:]:
        method = names[label]
        assert (ratio, divergence, agree) == (f"{lines[method]['ratio']:.1f}", kl(method), percent(lines[method]["agreement"]))
        assert loaded == (kl(f"{method}, high") if method.startswith("archive") else "")


def test_table_of_loading_archives() -> None:
    """Seconds with two places, bytes in megabytes with one."""
    columns = [result(f"prefix-smollm2-{quantizer}")["rows"][0] for quantizer in ("joint", "uniform")]
    ((_, table),) = tables("docs/archive.md", "2,048 tokens")
    names = {
        "reading the prompt, to the first token": "recompute_s",
        "packing what was read": "pack_s",
        "reading and packing, to the first token": "store_miss_s",
        "loading the archive, packing included": "archive_load_s",
        "loading the archive, to the first token": "archive_first_token_s",
        "loading a cache file, to the first token": "file_first_token_s",
        "bytes of the archive": "archive_bytes",
        "bytes of the cache file": "file_bytes",
    }
    assert [row[0] for row in table[2:]] == list(names)
    for label, *cells in table[2:]:
        shown = [f"{c[names[label]] / 1e6:.1f} MB" if "bytes" in label else f"{c[names[label]]:.2f} s" for c in columns]
        assert cells == shown and all(c["tokens"] == 2048 for c in columns)


def test_table_of_archives_of_three_models() -> None:
    ((_, table),) = tables("docs/archive.md", "model | KL of `high`")
    files = {"SmolLM2-135M": "smollm2", "Qwen2.5-Coder-1.5B": "qwen", "Gemma 3 270M": "gemma3"}
    assert [row[0] for row in table[2:]] == list(files)
    for model, high, *cells in table[2:]:
        lines = {line["method"]: line for line in result(f"archive-{files[model]}")["summary"]}
        assert high == f"{lines['high']['kl']:.4f}"
        for rate, cell in zip((-4, 0, 4, 8), cells, strict=True):
            archived, packed = lines[f"archive {rate}"], lines[f"archive {rate}, high"]
            assert cell == f"{archived['ratio']:.1f}x, {archived['kl']:.4f}, {packed['kl']:.4f}"


def test_table_of_loading_prefixes() -> None:
    ((_, table),) = tables("docs/prefixes.md", "model | tokens | recompute")
    names = ("prefix-smollm2-cpu", "prefix-smollm2-cpu", "prefix-smollm2-h200", "prefix-qwen-h200", "prefix-qwen-h200")
    assert len(table) == 2 + len(names)
    timed = ("file_first_token_s", "store_first_token_s", "file_save_s", "store_save_s")
    for name, (_, tokens, *cells) in zip(names, table[2:], strict=True):
        row = next(row for row in result(name)["rows"] if f"{row['tokens']:,}" == tokens)
        seconds = [f"{row['recompute_s']:.3g} s", *(f"{row[key]:.2g} s" for key in timed)]
        assert cells == [*seconds, *(f"{row[key] / 1e6:.1f} MB" for key in ("file_bytes", "store_bytes", "fp16_bytes"))]


def test_random_programs() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    cache, generate = result("state-machine-cpu"), result("state-machine-generate-cpu")
    assert cache["failure"] is None and generate["failure"] is None
    assert "{programs:,} programs with {checks:,} checks".format(**cache["counts"]) in text
    assert "{programs:,} programs with {turn:,} turns and {failed:,} calls that failed".format(**generate["counts"]) in text
