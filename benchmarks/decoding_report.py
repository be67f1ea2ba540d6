"""Tables and pictures of what `benchmarks/decoding.py` measured.

    python benchmarks/decoding_report.py RESULT.json [RESULT.json ...] [--images FOLDER]

Prints a Markdown table per suite, and writes `decoding-contexts.png` and `decoding-batches.png` to the folder (default docs/images). Several files are read as
one run of the same model on the same device.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from spectralquant.errors import ConfigError
from spectralquant.evaluation.plots.style import COLOURS, GREY, OUR_COLOUR, new_figure, settings

LINES = {
    "dynamic": ("DynamicCache, FP16", COLOURS[5], "s"),
    "static, compiled": ("StaticCache, FP16, compiled", COLOURS[0], "^"),
    "hqq, 4 bits": ("QuantizedCache, HQQ 4 bits", COLOURS[1], "D"),
    "hqq, 2 bits": ("QuantizedCache, HQQ 2 bits", COLOURS[3], "v"),
    "packed": ("spectralquant", OUR_COLOUR, "o"),
    "packed, compiled": ("spectralquant, steps compiled", OUR_COLOUR, "P"),
    "packed, no graph": ("spectralquant, no graphs", GREY, "o"),
}
"""Cache -> name, colour and marker."""
COLUMNS = {
    "contexts": ("context", "batch", "cache", "token_ms", "tokens_per_s", "cache_bytes", "peak_bytes"),
    "batches": ("context", "batch", "cache", "token_ms", "tokens_per_s", "cache_bytes", "peak_bytes"),
    "prefix": ("context", "batch", "cache", "token_ms", "tokens_per_s", "cache_bytes", "peak_bytes"),
    "largest": ("grows", "cache", "batch", "context", "token_ms", "tokens_per_s", "peak_bytes"),
    "prompt": ("context", "piece", "cache", "prompt_s", "peak_bytes"),
    "peak": ("context", "batch", "piece", "cache", "seconds", "peak_bytes", "planned_bytes"),
}
_HEADS = {"token_ms": "ms a token", "tokens_per_s": "tokens/s", "cache_bytes": "cache", "peak_bytes": "peak beside the weights", "prompt_s": "seconds"}
_HEADS |= {"piece": "in pieces of", "planned_bytes": "planned"}


def read(paths: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all files say of their run, and all rows.

    Raises:
        ConfigError: A file is no result of decoding.py, or they are of different models or devices.
    """
    documents = []
    for path in paths:
        try:
            documents.append(json.loads(path.read_text()))
            documents[-1]["rows"][0]["suite"]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(f"{path} is no result of benchmarks/decoding.py ({type(error).__name__}: {error})") from error
    heads = [{key: document[key] for key in ("device", "shape", "preset", "versions")} for document in documents]
    if any(head != heads[0] for head in heads):
        raise ConfigError(f"results of different runs: {heads}; give files of one model, device and software")
    return heads[0], [row for document in documents for row in document["rows"]]


def table(suite: str, rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = [c for c in COLUMNS[suite] if any(row.get(c) is not None for row in rows)]
    lines = [columns, ["---"] * len(columns), *([_cell(c, row) for c in columns] for row in rows)]
    lines[0] = [_HEADS.get(c, c) for c in columns]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(column: str, row: dict[str, Any]) -> str:
    value = row.get(column)
    if value is None:
        return "out of memory" if row.get("out_of_memory") and column in ("token_ms", "seconds") else "all" if column == "piece" else ""
    if column == "cache":
        return LINES[value][0]
    if column.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    return f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)


def draw(head: dict[str, Any], rows: list[dict[str, Any]], suite: str, axis: str, measure: str) -> Any:
    """A line per cache: `measure` over `axis`. Single sequences of the same length belong to the batches."""
    mine = [row for row in rows if row["suite"] == suite and measure in row]
    if suite == "batches":
        kinds = {row["cache"] for row in mine}
        mine += [row for row in rows if row["suite"] == "contexts" and row["context"] == mine[0]["context"] and row["cache"] in kinds]
    figure = new_figure(7.5, 5.0)
    axes = figure.subplots()
    for cache, (name, colour, mark) in LINES.items():
        points = sorted((row[axis], row[measure]) for row in mine if row["cache"] == cache)
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=mark, ms=8, lw=2.2 if colour == OUR_COLOUR else 1.5, label=name)
    axes.set(xlabel={"context": "tokens in the cache", "batch": "sequences"}[axis])
    axes.set(ylabel={"token_ms": "milliseconds per token", "tokens_per_s": "tokens per second, all sequences"}[measure])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row[axis] for row in mine}), [f"{x:,}" for x in sorted({row[axis] for row in mine})])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend()
    where = "one sequence" if axis == "context" else f"{mine[0]['context']:,} tokens each"
    figure.supxlabel(f"shape of {head['shape']}, bfloat16, {where}, {head['device']}, through model.generate", fontsize=9, color=GREY)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--images", type=Path, default=Path(__file__).parents[1] / "docs" / "images", metavar="FOLDER")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    head, rows = read(args.results)
    for suite in COLUMNS:
        if mine := [row for row in rows if row["suite"] == suite]:
            print(f"### {suite}\n\n{table(suite, mine)}\n")
    args.images.mkdir(parents=True, exist_ok=True)
    with settings():
        for suite, axis, measure in (("contexts", "context", "token_ms"), ("batches", "batch", "tokens_per_s")):
            if any(row["suite"] == suite for row in rows):
                draw(head, rows, suite, axis, measure).savefig(args.images / f"decoding-{suite}.png")


if __name__ == "__main__":
    main()
