"""What the page says, part by part: text, pictures and tables from a run's parts. How it looks is in the template."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spectralquant.byte_counts import told_bytes
from spectralquant.evaluation.page.run import Row, Run, listed
from spectralquant.evaluation.page.svg import inline_svg
from spectralquant.evaluation.plots.bit_allocation import coded_jointly, draw_bit_allocation
from spectralquant.evaluation.plots.kl_against_bits import draw_kl_against_bits_at
from spectralquant.evaluation.plots.kl_by_position import draw_kl_by_position
from spectralquant.evaluation.plots.spectra import draw_spectra
from spectralquant.evaluation.plots.speed import draw_memory_by_context, draw_prompt_by_context, draw_speed_by_context
from spectralquant.evaluation.plots.style import OURS, Point, points_of
from spectralquant.evaluation.report import RunReport, Table, tables_of
from spectralquant.evaluation.speed import UNCOMPRESSED


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


def sections_of(run: Run) -> list[Section]:
    return [_quality(run), _positions(run), _memory(run), _speed(run), _spectra(run), _bits(run), _tables(run)]


# Quality --------------------------------------------------------------------------------------------------------------


def _quality(run: Run) -> Section:
    title = "Error against size"
    if run.report is None or not run.report.language:
        return Section("quality", title, missing=("The error was not measured.", run.command("evaluate")))
    told = "Mean KL over the bits per element of every method at {} tokens of context, both axes logarithmic."
    pictures = _by_context(run.report, "quality", "KL against bits", draw_kl_against_bits_at, told, lambda context: _compared(run, context))
    text = (
        "Down and to the left is better: fewer bits, less error. KL is the divergence of the model's next-token distribution from that of the uncompressed "
        "model, in nats per token, mean over the texts; bits count all that is stored of the coded history: codes, scales, and tokens that stay exact. Bars "
        "are standard errors over windows; hollow marks are methods whose codes are simulated and whose size is counted. 16-bit caches are in the tables only.",
    )
    return Section("quality", title, text, pictures, legend=True)


def _by_context(
    report: RunReport, anchor: str, title: str, draw: Callable[[RunReport, int], Any], told: str, caption: Callable[[int], str]
) -> tuple[Picture, ...]:
    """A picture for every context that has something to draw. `told`, with the context in the place of {}, says to who can't see it what it shows."""
    figures = ((context, draw(report, context)) for context in _contexts(report))
    return tuple(
        Picture(inline_svg(figure, f"{anchor}-{context}", f"{title}, {context:,} tokens", told.format(f"{context:,}")), caption(context))
        for context, figure in figures
        if figure is not None
    )


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
        return Section("positions", title, missing=("The error was not measured.", run.command("evaluate")))
    told = "Mean KL over the position of the scored token behind {} tokens of context, a line per method, logarithmic."
    pictures = _by_context(run.report, "positions", "KL by position", draw_kl_by_position, told, lambda context: f"Behind {context:,} tokens of context.")
    text = (
        "A flat line means that errors do not pile up as the text goes on. Each point is the mean KL of a piece of neighbouring tokens over all windows and "
        "texts; what all lines share is the text itself, which is easier to predict in some places. Of the other families the method nearest in size is drawn.",
    )
    return Section("positions", title, text, pictures)


def _tables(run: Run) -> Section:
    title = "Tables"
    tables = tables_of(run.report) if run.report is not None else []
    if not tables:
        return Section("tables", title, missing=("There are no tables: nothing was evaluated.", run.command("evaluate")))
    return Section("tables", title, tables=tuple(tables))


def _contexts(report: RunReport) -> list[int]:
    return list(dict.fromkeys(line["context"] for line in report.language))


# Memory and speed -----------------------------------------------------------------------------------------------------


def _memory(run: Run) -> Section:
    title = "Memory against context"
    if not run.bench_rows:
        return Section("memory", title, missing=("Memory was not measured.", run.command("bench")))
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
        return Section("speed", title, missing=("Speed was not measured.", run.command("bench")))
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
        text += (f"Decode steps of compressed caches, as decode_report names them: {listed(modes)}.",)
    return Section("speed", title, text, pictures)


def _bench_table(run: Run) -> Table:
    header = ("cache", "context", "whole cache", "of FP16", "constants", "prompt", "tokens/s", "slowest to fastest", "peak beside weights")
    plain = {row["context"]: row for row in run.bench_rows if row["cache"] == UNCOMPRESSED}
    rows = [_bench_cells(row, plain.get(row["context"])) for row in (run.bench or {"rows": []})["rows"]]
    columns = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]  # without a GPU there is no peak
    notes = (
        "Of FP16: share of what 16 bits would take for the same tokens. Constants: of the codec, once per model. Prompt: seconds to the first token. "
        "Speed in brackets: against the uncompressed cache.",
    )
    return Table("Memory and speed", tuple(header[i] for i in columns), tuple(tuple(row[i] for i in columns) for row in rows), notes)


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
        return Section("spectra", title, missing=("The run holds no calibration.", run.command("calibrate")))
    share = run.preset.d_eff_variance
    pictures = []
    for side, name in (("key", "keys"), ("value", "values")):
        told = f"A small panel per layer: variance of each coordinate of the {name}, falling, logarithmic, the semantic band in colour and the tail in grey."
        caption = (
            f"{name.capitalize()}, a panel per layer, its number above. In colour the semantic band, the coordinates that hold {100 * share:.0f} % of the "
            "variance; the number inside says how many."
        )
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
        return Section("bits", title, missing=("The run holds no calibration.", run.command("calibrate")))
    widths = "the widths in which coordinates are stored, 0 to 8 bits; 0 drops a coordinate. Heads differ, so means lie between."
    joint = (
        "they are coded jointly, a block of coordinates at a time, so no coordinate has a width of its own. Shown is what the codes are worth: half the "
        "logarithm to base 2 of variance over error, measured here on Gaussian samples of the spectra with the codebooks of the calibration."
    )
    captions = {"key": f"Keys: {widths}", "value": f"Values: {joint if coded_jointly(run.profile, run.preset) else widths}"}
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
