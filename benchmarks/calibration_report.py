"""What the lines of benchmarks/calibration.py say together, as figures and as pictures."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spectralquant.evaluation.metrics import standard_error
from spectralquant.evaluation.plots.style import COLOURS, DPI, GREY, MARKERS, OUR_COLOUR, SETTINGS, require_matplotlib

Lines = Sequence[dict[str, Any]]


def scored_lines(lines: Lines, study: str) -> list[dict[str, Any]]:
    """Lines of a study whose calibration did not fail."""
    return [line for line in lines if line["study"] == study and "texts" in line]


def setting(line: dict[str, Any]) -> Any:
    """What a line differs in from the others of its study."""
    return next(iter(line["settings"].values()))


# Figures ----------------------------------------------------------------------------------------------------------------


def summarise(lines: Lines) -> dict[str, Any]:
    """Study -> text -> what its lines say together."""
    found = {}
    for study in dict.fromkeys(line["study"] for line in lines):
        mine, tell = scored_lines(lines, study), {"seeds": _tell_seeds, "menu": _tell_menu}.get(study, _tell_shares)
        found.update({study: {text: tell(mine, text) for text in mine[0]["texts"]}} if mine else {})
    return found


def _tell_shares(lines: Lines, text: str) -> dict[str, float]:
    """KL of each line as a multiple of the least."""
    kl = {str(setting(line)): line["texts"][text]["kl"] for line in lines}
    return {name: value / min(kl.values()) for name, value in kl.items()}


def _tell_seeds(lines: Lines, text: str) -> dict[str, float]:
    kl = [line["texts"][text]["kl"] for line in lines]
    return {"halves": len(kl), "mean": mean(kl), **({"standard_deviation": stdev(kl)} if len(kl) > 1 else {})}


def _tell_menu(lines: Lines, text: str) -> dict[str, Any]:
    """The menu's choice beside the candidate that is best on this text, with the standard error of their difference over windows."""
    chosen, best = next((line for line in lines if line["chosen"]), None), min(lines, key=lambda line: line["texts"][text]["kl"])
    if chosen is None:
        return {}
    mine, least = chosen["texts"][text], best["texts"][text]
    return {
        "chosen": setting(chosen),
        "best": setting(best),
        "chosen_over_best": mine["kl"] / least["kl"],
        "within_10_percent": mine["kl"] <= 1.1 * least["kl"],
        "difference": mine["kl"] - least["kl"],
        "difference_se": standard_error([a - b for a, b in zip(mine["kl_per_window"], least["kl_per_window"], strict=True)]),
    }


# Pictures ---------------------------------------------------------------------------------------------------------------


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG per study that has lines: calibration_STUDY.png in `folder`; returns their paths.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for study, plot in {"tokens": _plot_tokens, "kinds": _plot_bars, "shift": _plot_bars, "seeds": _plot_seeds, "menu": _plot_menu}.items():
        lines = scored_lines(document["lines"], study)
        if lines:
            with rc_context(SETTINGS):
                figure = Figure(figsize=(max(8.6, 2 + 3.3 * len(lines[0]["texts"])), 5.2), dpi=DPI, layout="constrained")
                figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
                note = f"{_conditions(document['settings'])}; {plot(figure.subplots(), lines)}"
                figure.supxlabel(textwrap.fill(note, int(12 * figure.get_figwidth())), fontsize=9, color=GREY)
                written.append(folder / f"calibration_{study}.png")
                figure.savefig(written[-1])
    return written


def _conditions(settings: dict[str, Any]) -> str:
    return f"{settings['model']}, preset {settings['preset']}, {settings['context']:,} tokens of context, {settings['windows']} windows per text"


def _plot_tokens(axes: Any, lines: Lines) -> str:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines = sorted(lines, key=lambda line: line["tokens"])
    tokens = [line["tokens"] for line in lines]
    for i, text in enumerate(lines[0]["texts"]):
        kl, error = ([line["texts"][text][key] for line in lines] for key in ("kl", "kl_se"))
        axes.errorbar(tokens, kl, error, label=text, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], lw=2, capsize=3, elinewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="calibration tokens", ylabel="KL in nats per token")
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:.3g}k"))
    least = min(x["kl"] for line in lines for x in line["texts"].values())
    axes.set_ylim(bottom=max(axes.get_ylim()[0], least / 2))  # a bar that reaches zero ends at the frame
    _plain_ticks(axes.yaxis)
    axes.figure.legend(loc="outside upper center", ncols=4, title="tested on")
    return "bars: standard error over windows, which are the same for all points of a text"


def _plain_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, evenly spaced ones where it is short: a decade has few round numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(8, steps=[1, 2, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _plot_bars(axes: Any, lines: Lines) -> str:
    texts, width = list(lines[0]["texts"]), 0.84 / len(lines)
    for i, line in enumerate(lines):
        kind = setting(line)
        places = [j + (i - (len(lines) - 1) / 2) * width for j in range(len(texts))]
        kl, error = ([line["texts"][text][key] for text in texts] for key in ("kl", "kl_se"))
        colour = OUR_COLOUR if kind in ("all", "both") else COLOURS[i % len(COLOURS)]
        axes.bar(places, kl, 0.92 * width, label=kind, color=colour, yerr=error, error_kw={"elinewidth": 1, "capsize": 3, "ecolor": "#333333"})
        for x, y, e in zip(places, kl, error, strict=True):
            axes.annotate(f"{y:.3g}", (x, y + e), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(texts)), [f"tested on {text}" for text in texts])
    axes.set_ylabel("KL in nats per token")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    axes.figure.legend(loc="outside upper center", ncols=len(lines) + 1, title="calibrated on")
    return f"{lines[0]['tokens']:,} calibration tokens each; bars: standard error over windows"


def _plot_seeds(axes: Any, lines: Lines) -> str:
    """Deviations from the mean in per cent: texts differ in their KL far more than halves do."""
    labels = []
    for i, text in enumerate(lines[0]["texts"]):
        kl = [line["texts"][text]["kl"] for line in lines]
        centre, spread = mean(kl), stdev(kl) if len(kl) > 1 else 0.0
        off = [100 * (k / centre - 1) for k in kl]
        share = 100 * spread / centre
        colour = COLOURS[i % len(COLOURS)]
        axes.bar(i, 2 * share, 0.5, -share, color=colour, alpha=0.15)
        axes.plot([i - 0.25, i + 0.25], [0, 0], color=colour, lw=2)
        axes.plot([i + 0.34 * (j + 0.5) / len(off) - 0.17 for j in range(len(off))], off, "o", ms=9, color=colour, mec="white")
        labels.append(f"{text}\n{centre:.3g} ± {spread:.2g} ({share:.1f} %)")
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlim=(-0.6, len(labels) - 0.4), ylabel="KL, deviation from the mean in %")
    axes.grid(axis="x", visible=False)
    return f"a dot: one random half of the corpus, seeds {setting(lines[0])} to {setting(lines[-1])} from left to right; band: ± 1 standard deviation"


def _plot_menu(axes: Any, lines: Lines) -> str:
    """Everything relative to the candidate that was chosen; error bars are of the difference to it, window by window."""
    chosen = next((line for line in lines if line["chosen"]), lines[0])
    axes.axvspan(0.9, 1 / 0.9, color="#EEEEEE", zorder=0)
    axes.axvline(1, color=GREY, lw=1)
    for i, text in enumerate(lines[0]["texts"]):
        base = chosen["texts"][text]
        share = [line["texts"][text]["kl"] / base["kl"] for line in lines]
        pairs = [zip(line["texts"][text]["kl_per_window"], base["kl_per_window"], strict=True) for line in lines]
        error = [standard_error([a - b for a, b in pair]) / base["kl"] for pair in pairs]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "ls": "", "ms": 7, "capsize": 3, "elinewidth": 1}
        axes.errorbar(share, [j + 0.16 * (i + 1) for j in range(len(lines))], xerr=error, label=f"KL on {text}", **style)
    scores = [line["menu_score"] / chosen["menu_score"] for line in lines]
    axes.plot(scores, range(len(lines)), "o", color=OUR_COLOUR, mfc="white", mew=1.8, ms=8, label="menu's score, on its own windows")
    axes.set_yticks([j + 0.08 * len(lines[0]["texts"]) for j in range(len(lines))], [_candidate_name(line) for line in lines])
    for label, line in zip(axes.get_yticklabels(), lines, strict=True):
        label.set(color=OUR_COLOUR if line["chosen"] else "#222222", weight="bold" if line["chosen"] else "normal")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xscale="log", xlabel="relative to the chosen candidate")
    _plain_ticks(axes.xaxis)
    axes.figure.legend(loc="outside upper center", ncols=4)
    return "bold: chosen; shaded: 10\N{NO-BREAK SPACE}%, the gain that the menu asks of a change; bars: standard error of the difference over windows"


def _candidate_name(line: dict[str, Any]) -> str:
    change = "\n".join(f"{k} = {v}" for k, v in line["changed"].items()) or "start"
    return f"{change} (kept)" if line["kept"] and line["changed"] else change
