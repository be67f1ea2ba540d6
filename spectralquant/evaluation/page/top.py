"""The top of the page: what was measured, in words, and the key figures of every preset."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from spectralquant.evaluation.page.run import Row, Run, counted, listed
from spectralquant.evaluation.page.svg import series_names
from spectralquant.evaluation.plots.style import OURS, family_styles, points_of, set_apart
from spectralquant.evaluation.speed import UNCOMPRESSED
from spectralquant.presets import PRESETS


@dataclass(frozen=True, slots=True)
class Card:
    """Key figures of one preset: the large one with what it is, and others as (name, value)."""

    title: str
    figure: str
    unit: str
    lines: tuple[tuple[str, str], ...]


def headline(run: Run) -> str:
    """What was measured, in a few words."""
    parts = []
    if run.report is not None and run.report.language:
        texts, contexts = (dict.fromkeys(line[column] for line in run.report.language) for column in ("text", "context"))
        parts.append(
            f"how far its predictions move when its KV cache is compressed, on {listed(texts)} behind {listed(f'{c:,}' for c in contexts)} tokens of "
            f"context, for {len(run.report.methods)} ways to keep a cache"
        )
    if run.report is not None and run.report.needles:
        parts.append("whether it still finds facts in a long text")
    if run.report is not None and run.report.problems:
        parts.append("whether it still solves word problems")
    if run.bench_rows:
        parts.append("how much memory whole caches take and how fast it decodes")
    return f"What was measured of {run.model}: {'; '.join(parts)}." if parts else f"Nothing of {run.model} has been measured yet."


def facts_of(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, (name, value)...) of the evaluation and the bench."""
    found = []
    for document, title in ((run.report and run.report.config, "Evaluation"), (run.bench, "Speed and memory")):
        if not document:
            continue
        plan = document["plan"]
        versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
        facts = [("Model", f"{plan['model']}, {document['dtype']}"), ("Machine", f"{document['device']}, {counted(document['threads'], 'thread')}")]
        facts += [("Versions", f"Python {document['python']}, {versions}"), ("How", _how(plan))]
        if document["command"]:
            facts.append(("Command", document["command"]))
        facts += [("Not run", reason) for reason in document.get("unavailable", {}).values()]
        found.append((title, facts))
    return found


def _how(plan: dict[str, Any]) -> str:
    if "windows" in plan:
        return f"{counted(plan['windows'], 'window')} of text, {plan['scored']} scored tokens each, read in pieces of {plan['chunk']}; seed {plan['seed']}"
    return f"{counted(plan['repeats'], 'round')}, {counted(plan['new_tokens'], 'token')} decoded behind each prompt; medians"


def key_figures(run: Run) -> list[Card]:
    """A card for every preset that was measured, at `scored_context`."""
    context = scored_context(run)
    lines = [line for line in run.report.language if line["context"] == context] if run.report else []
    whole = _whole_caches(run)
    cards = []
    for name in PRESETS:
        mine = [line for line in lines if line["method"] == name]
        shown: list[tuple[str, str]] = []
        if mine:
            shown += [("KL", f"{_mean(line['kl'] for line in mine):.2g}"), ("same token", f"{100 * _mean(line['agreement'] for line in mine):.1f} %")]
        if name in whole:
            row, plain = whole[name]
            shown.append((f"whole at {row['context']:,}", f"{row['fp16_bytes'] / row['cache_bytes']:.1f}x smaller"))
            shown.append(("decoding there", f"{row['tokens_per_s'] / plain['tokens_per_s']:.2f}x as fast"))
        if mine:
            cards.append(
                Card(name, f"{16 / _mean(line['bits'] for line in mine):.2f}x", f"smaller, {_mean(line['bits'] for line in mine):.2f} bits", tuple(shown))
            )
        elif name in whole:
            row, _ = whole[name]
            cards.append(Card(name, f"{row['fp16_bytes'] / row['cache_bytes']:.2f}x", "smaller, whole cache", tuple(shown)))
    return cards


def scored_context(run: Run) -> int | None:
    """The longest at which a preset was scored."""
    return max((line["context"] for line in run.report.language if line["method"] in PRESETS), default=None) if run.report else None


def _whole_caches(run: Run) -> dict[str, tuple[Row, Row]]:
    """Preset -> (its row, the uncompressed cache's) at the longest context that both have."""
    plain = {row["context"]: row for row in run.bench_rows if row["cache"] == UNCOMPRESSED}
    rows = sorted((row for row in run.bench_rows if row["cache"] != UNCOMPRESSED and row["context"] in plain), key=lambda row: row["context"])
    return {row["cache"]: (row, plain[row["context"]]) for row in rows}


def legend(run: Run) -> list[tuple[str, str]]:
    """(variable of the colour, family) of the methods in the pictures of KL."""
    if run.report is None:
        return []
    styles, names = family_styles(run.report.methods), series_names()
    _, panels = set_apart({context: points_of(run.report, context) for context in {line["context"] for line in run.report.language}})
    drawn = dict.fromkeys(point.method.family for points in panels.values() for point in points)
    return [(names[styles[family].colour], family) for family in sorted(styles, key=lambda family: family != OURS) if family in drawn]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan
