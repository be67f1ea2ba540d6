"""What the page says, part by part: text, pictures and tables from a run's parts. How it looks is in the template."""

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from spectralquant.evaluation.page.svg import inline_svg, series_names
from spectralquant.evaluation.plots.bit_allocation import draw_bit_allocation
from spectralquant.evaluation.plots.kl_against_bits import draw_kl_against_bits_at
from spectralquant.evaluation.plots.kl_by_position import draw_kl_by_position
from spectralquant.evaluation.plots.spectra import draw_spectra
from spectralquant.evaluation.plots.speed import draw_memory_by_context, draw_prompt_by_context, draw_speed_by_context
from spectralquant.evaluation.plots.style import OURS, Point, family_styles, points_of
from spectralquant.evaluation.report import RunReport, Table, tables_of
from spectralquant.evaluation.speed import UNCOMPRESSED
from spectralquant.memory import told_bytes
from spectralquant.presets import PRESETS, CompressionPreset
from spectralquant.profile import Profile

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """The parts of a run that its folder holds.

    Attributes:
        name: Of the folder.
        report: Of an evaluation.
        bench: What `speed.bench` wrote.
        profile: The calibration.
    """

    name: str
    report: RunReport | None
    bench: dict[str, Any] | None
    profile: Profile | None

    @property
    def model(self) -> str:
        return self.documents[0]["plan"]["model"]

    @property
    def documents(self) -> list[dict[str, Any]]:
        """Configurations of what was run: plan, command, machine, versions."""
        return [document for document in (self.report and self.report.config, self.bench) if document]

    @property
    def preset(self) -> CompressionPreset:
        """The one that is looked into: "high" where it was measured, else the first that was."""
        measured = [m.name for m in self.report.methods] if self.report else []
        measured += self.bench["plan"]["presets"] if self.bench else []
        ours = [name for name in measured if name in PRESETS]
        return PRESETS["high" if "high" in ours or not ours else ours[0]]

    @property
    def bench_rows(self) -> list[Row]:
        """Those with figures: memory sufficed."""
        return [row for row in (self.bench or {"rows": []})["rows"] if "out_of_memory" not in row]


@dataclass(frozen=True, slots=True)
class Picture:
    """An <svg> element and what to see in it."""

    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. `missing` is (what isn't there, the command that makes it), where nothing else is."""

    name: str
    title: str
    text: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    missing: tuple[str, str] | None = None
    legend: bool = False


@dataclass(frozen=True, slots=True)
class Card:
    """Key figures of one preset: the large one with its unit, and others as (name, value)."""

    title: str
    figure: str
    unit: str
    lines: tuple[tuple[str, str], ...] = field(default=())


def sections_of(run: Run) -> list[Section]:
    return [_quality(run), _positions(run), _tables(run), _memory(run), _speed(run), _spectra(run), _bits(run)]


# The top --------------------------------------------------------------------------------------------------------------


def headline(run: Run) -> str:
    """What was measured, in a few words."""
    parts = []
    if run.report is not None and run.report.language:
        texts, contexts = (dict.fromkeys(line[column] for line in run.report.language) for column in ("text", "context"))
        parts.append(
            f"how far its predictions move when its KV cache is compressed, on {_listed(texts)} behind {_listed(f'{c:,}' for c in contexts)} tokens of "
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
        facts = [("Model", f"{plan['model']}, {document['dtype']}"), ("Machine", f"{document['device']}, {document['threads']} threads")]
        facts += [("Versions", f"Python {document['python']}, {versions}"), ("How", _how(plan))]
        if document["command"]:
            facts.append(("Command", document["command"]))
        facts += [("Not run", reason) for reason in document.get("unavailable", {}).values()]
        found.append((title, facts))
    return found


def _how(plan: dict[str, Any]) -> str:
    if "windows" in plan:
        return f"{plan['windows']} windows of text, {plan['scored']} scored tokens each, read in pieces of {plan['chunk']}; seed {plan['seed']}"
    return f"{plan['repeats']} rounds, {plan['new_tokens']} tokens decoded behind each prompt; medians"


def key_figures(run: Run) -> list[Card]:
    """A card for every preset that was measured."""
    contexts = sorted({line["context"] for line in run.report.language}) if run.report else []
    lines = [line for line in run.report.language if line["context"] == contexts[-1]] if run.report and contexts else []
    whole = _whole_caches(run)
    cards = []
    for name in PRESETS:
        mine = [line for line in lines if line["method"] == name]
        shown: list[tuple[str, str]] = []
        if mine:
            shown += [("KL", f"{_mean(line['kl'] for line in mine):.2g}"), ("same token", f"{100 * _mean(line['agreement'] for line in mine):.1f} %")]
        if name in whole:
            row, plain = whole[name]
            shown.append(("whole cache", f"{row['fp16_bytes'] / row['cache_bytes']:.1f}x smaller at {row['context']:,}"))
            shown.append(("decoding", f"{row['tokens_per_s'] / plain['tokens_per_s']:.2f}x the speed"))
        if mine:
            cards.append(
                Card(name, f"{16 / _mean(line['bits'] for line in mine):.2f}x", f"smaller, {_mean(line['bits'] for line in mine):.2f} bits", tuple(shown))
            )
        elif name in whole:
            row, _ = whole[name]
            cards.append(Card(name, f"{row['fp16_bytes'] / row['cache_bytes']:.2f}x", "smaller, whole cache", tuple(shown)))
    return cards


def _whole_caches(run: Run) -> dict[str, tuple[Row, Row]]:
    """Preset -> (its row, the uncompressed cache's) at the longest context that both have."""
    plain = {row["context"]: row for row in run.bench_rows if row["cache"] == UNCOMPRESSED}
    rows = sorted((row for row in run.bench_rows if row["cache"] != UNCOMPRESSED and row["context"] in plain), key=lambda row: row["context"])
    return {row["cache"]: (row, plain[row["context"]]) for row in rows}


def legend(run: Run) -> list[tuple[str, str]]:
    """(variable of the colour, family) of the methods in the run."""
    if run.report is None:
        return []
    styles, names = family_styles(run.report.methods), series_names()
    measured = dict.fromkeys(m.family for m in run.report.methods)
    return [(names[styles[family].colour], family) for family in sorted(measured, key=lambda family: family != OURS)]


# Quality --------------------------------------------------------------------------------------------------------------


def _quality(run: Run) -> Section:
    title = "Error against size"
    if run.report is None or not run.report.language:
        return Section("quality", title, missing=("The error was not measured.", _command(run, "evaluate")))
    pictures = []
    for context in _contexts(run.report):
        figure = draw_kl_against_bits_at(run.report, context)
        if figure is not None:
            told = f"Mean KL over the bits per element of every method at {context:,} tokens of context, both axes logarithmic."
            pictures.append(Picture(inline_svg(figure, f"quality-{context}", f"KL against bits, {context:,} tokens", told), _compared(run, context)))
    text = (
        "Down and to the left is better: fewer bits, less error. KL is the divergence of the model's next-token distribution from that of the uncompressed "
        "model, in nats per token, mean over the texts; bits count all that is stored of the coded history: codes, scales, and tokens that stay exact. Bars "
        "are standard errors over windows; hollow marks are methods whose codes are simulated and whose size is counted. 16-bit caches are in the tables only.",
    )
    return Section("quality", title, text, tuple(pictures), legend=True)


def _compared(run: Run, context: int) -> str:
    """The preset that is looked into beside the best other method that is no larger."""
    assert run.report is not None
    points = points_of(run.report, context)
    mine = next((p for p in points if p.method.name == run.preset.name), None)
    if mine is None:
        return f"At {context:,} tokens of context."
    told = f"At {context:,} tokens {_named(mine)}."
    others = [p for p in points if p.method.family != OURS and p.bits <= 1.05 * mine.bits]
    if others:
        told += f" The best other method of at most its size (within 5 %): {_named(min(others, key=lambda p: p.kl))}."
    smaller = [p for p in points if p.method.family != OURS and p.kl <= mine.kl and p.bits < 16]
    if smaller:
        told += f" The smallest other method with no more error: {_named(min(smaller, key=lambda p: p.bits))}."
    return told


def _named(point: Point) -> str:
    return f"{point.method.name} has a KL of {point.kl:.2g} at {point.bits:.2f} bits"


def _positions(run: Run) -> Section:
    title = "Error by token position"
    if run.report is None or not run.report.language:
        return Section("positions", title, missing=("The error was not measured.", _command(run, "evaluate")))
    pictures = []
    for context in _contexts(run.report):
        figure = draw_kl_by_position(run.report, context)
        if figure is not None:
            told = f"Mean KL over the position of the scored token behind {context:,} tokens of context, a line per method, logarithmic."
            caption = f"Behind {context:,} tokens of context."
            pictures.append(Picture(inline_svg(figure, f"positions-{context}", f"KL by position, {context:,} tokens", told), caption))
    text = (
        "A flat line means that errors do not pile up as the text goes on. Each point is the mean KL of a piece of neighbouring tokens over all windows and "
        "texts; what all lines share is the text itself, which is easier to predict in some places. Of the other families the method nearest in size is drawn.",
    )
    return Section("positions", title, text, tuple(pictures))


def _tables(run: Run) -> Section:
    title = "Figures"
    tables = tables_of(run.report) if run.report is not None else []
    if not tables:
        return Section("tables", title, missing=("There are no tables: nothing was evaluated.", _command(run, "evaluate")))
    return Section("tables", title, tables=tuple(tables))


def _contexts(report: RunReport) -> list[int]:
    return list(dict.fromkeys(line["context"] for line in report.language))


# Memory and speed -----------------------------------------------------------------------------------------------------


def _memory(run: Run) -> Section:
    title = "Memory against context"
    if not run.bench_rows:
        return Section("memory", title, missing=("Memory was not measured.", _command(run, "bench")))
    told = "Bytes of whole caches over the tokens of context, a line for the uncompressed cache and one for each preset."
    caption = "Bytes of every tensor that a cache holds, as allocated: codes, gains, exact tokens, the recent window in 16 bits, and room to grow."
    if run.bench is not None and run.bench["dtype"] == "float32":
        caption += " FP16 is what 16 bits would take; this run's uncompressed cache is in float32 and takes twice that."
    picture = Picture(inline_svg(draw_memory_by_context(run.bench_rows), "memory", "Memory against context", told), caption)
    text = (
        "The gap between the lines is what compression saves. Short contexts save less: the newest 128 to 255 tokens stay exact in every cache.",
        "Beside the caches a model keeps the codec's constants once, however many sequences there are; the table has them.",
    )
    return Section("memory", title, text, (picture,), (_bench_table(run),))


def _speed(run: Run) -> Section:
    title = "Speed against context"
    if not run.bench_rows:
        return Section("speed", title, missing=("Speed was not measured.", _command(run, "bench")))
    rows, bars = run.bench_rows, "Points are medians of the rounds, bars reach from the slowest to the fastest."
    speed = inline_svg(draw_speed_by_context(rows), "speed", "Tokens per second against context", "Tokens decoded per second over the tokens of context.")
    prompt = inline_svg(draw_prompt_by_context(rows), "prompt", "Prompt seconds against context", "Seconds to the first token over the tokens of context.")
    pictures = (
        Picture(speed, f"Decoding, one token at a time; higher is faster. {bars}"),
        Picture(prompt, f"Prompt, packing included; lower is faster. {bars}"),
    )
    modes = dict.fromkeys(row["decode_mode"] for row in rows if row["decode_mode"])
    text = ("One sequence through transformers' generate, its loop included.",)
    if modes:
        text += (f"How decode steps of compressed caches ran: {_listed(modes)}.",)
    return Section("speed", title, text, pictures)


def _bench_table(run: Run) -> Table:
    header = ("cache", "context", "whole cache", "of FP16", "constants", "prompt", "tokens/s", "slowest to fastest", "peak beside weights")
    plain = {row["context"]: row for row in run.bench_rows if row["cache"] == UNCOMPRESSED}
    return Table("Memory and speed", header, tuple(_bench_cells(row, plain.get(row["context"])) for row in run.bench["rows"]) if run.bench else (), ())


def _bench_cells(row: Row, plain: Row | None) -> tuple[str, ...]:
    name = "uncompressed" if row["cache"] == UNCOMPRESSED else row["cache"]
    if "out_of_memory" in row:
        return (name, f"{row['context']:,}", "out of memory", *("-" for _ in range(6)))
    share = f"{100 * row['cache_bytes'] / row['fp16_bytes']:.0f} %"
    relative = f" ({row['tokens_per_s'] / plain['tokens_per_s']:.2f}x)" if plain is not None and plain is not row else ""
    return (
        name,
        f"{row['context']:,}",
        told_bytes(row["cache_bytes"]),
        share,
        told_bytes(row["codec_bytes"]) if row["codec_bytes"] else "-",
        f"{row['prompt_s']:.3g} s",
        f"{row['tokens_per_s']:.3g}{relative}",
        f"{row['tokens_per_s_low']:.3g} to {row['tokens_per_s_high']:.3g}",
        "-" if row["peak_bytes"] is None else told_bytes(row["peak_bytes"]),
    )


# Inside the codec -----------------------------------------------------------------------------------------------------


def _spectra(run: Run) -> Section:
    title = "Spectra, layer by layer"
    if run.profile is None:
        return Section("spectra", title, missing=("The run holds no calibration.", _calibrate(run)))
    share = run.preset.d_eff_variance
    pictures = []
    for side, name in (("key", "keys"), ("value", "values")):
        told = (
            f"A small panel per layer: variance of each coordinate of the {name}, falling, logarithmic, with the semantic band in colour and the tail in grey."
        )
        caption = f"{name.capitalize()}. In colour the semantic band, the coordinates that hold {100 * share:.0f} % of the variance; the number says how many."
        pictures.append(Picture(inline_svg(draw_spectra(run.profile, side, share), f"spectra-{side}", f"Spectra of the {name}", told), caption))
    dim = next(iter(run.profile.layers.values())).head_dim
    text = (
        f"Calibration turns the {dim} coordinates of a head so that few of them hold most of what matters: the steeper a panel falls, the better it "
        "compresses. Variances are in the metric in which errors are felt, mean over the heads of a layer.",
        "Where no dial is set, presets do not cut at the split: they weigh every coordinate, as the next picture shows. The dials d_eff_variance, avg_bits, "
        "noise_bits and value_noise_bits do cut there.",
    )
    return Section("spectra", title, text, tuple(pictures))


def _bits(run: Run) -> Section:
    title = f"Where the bits go, preset {run.preset.name}"
    if run.profile is None:
        return Section("bits", title, missing=("The run holds no calibration.", _calibrate(run)))
    captions = {
        "key": "Keys: the widths in which coordinates are stored, 0 to 8 bits; 0 drops a coordinate. Heads differ, so means lie between.",
        "value": "Values: they are coded jointly, a block of coordinates at a time, so no coordinate has a width of its own. Shown are the widths that "
        'water-filling gives scalar codes of the same size, those of quantizer="uniform"; joint codes spend the same bits in all, in fractions for any coordinate.',
    }
    pictures = []
    for side, caption in captions.items():
        told = f"Bits per coordinate of the {side}s: layers downwards, coordinates by falling variance to the right, brighter is more bits."
        svg = inline_svg(draw_bit_allocation(run.profile, run.preset, side), f"bits-{side}", f"Bit allocation of the {side}s", told)
        pictures.append(Picture(svg, caption))
    text = (
        "Water-filling gives the next bits to the coordinate whose error falls the most by them, until the preset's budget is spent. All layers have the same "
        "budget; a layer with a steep spectrum spends it on few coordinates, one with a flat spectrum spreads it.",
    )
    return Section("bits", title, text, tuple(pictures))


# Words ----------------------------------------------------------------------------------------------------------------


def _command(run: Run, verb: str) -> str:
    return f"spectralquant {verb} MODEL --out {shlex.quote(run.name)}"


def _calibrate(run: Run) -> str:
    return f"spectralquant calibrate MODEL --out {shlex.quote(run.name + '/calibration.safetensors')}"


def _listed(words: Iterable[str]) -> str:
    *most, last = [str(word) for word in words]
    return f"{', '.join(most)} and {last}" if most else last


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan
