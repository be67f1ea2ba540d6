"""Size against divergence: presets, and settings of the engine's dials, on the same windows of text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import METHODS, Method, Subject
from spectralquant.evaluation.methods.ours import DIALS
from spectralquant.evaluation.metrics import summarise_language
from spectralquant.evaluation.plan import Plan
from spectralquant.evaluation.run_files import CONFIG, read_config
from spectralquant.evaluation.runner import run

Point = dict[str, Any]


def settings_for(presets: Sequence[str], dials: bool) -> tuple[Method, ...]:
    """The methods of a sweep."""
    return (*(METHODS[name] for name in presets), *(DIALS if dials else ()))


def sweep(settings: Sequence[Method], plan: Plan, subject: Subject, command: str) -> list[Point]:
    """A point per setting, the smallest cache first: its name, label and `metrics.summarise_language` over all windows. `subject.folder` keeps the rows.

    Raises:
        ConfigError: A setting can't be prepared for this model, or the folder holds another plan.
    """
    rows = run(plan, subject, command)
    if failed := read_config(subject.folder / CONFIG)["unavailable"]:
        raise ConfigError(f"{', '.join(failed)} could not be prepared: {'; '.join(dict.fromkeys(failed.values()))}")
    language = [row for row in rows if row["task"] == "language"]
    points = [{"name": m.name, "label": m.label, **summarise_language([r for r in language if r["method"] == m.name])} for m in settings]
    best = pareto(points)
    return sorted(({**p, "pareto": p in best} for p in points), key=lambda p: (p["bits"], p["kl"]))


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats in bits or KL without losing in the other."""
    figures = [(p["bits"], p["kl"]) for p in points]
    return [p for p, (b, k) in zip(points, figures, strict=True) if not any(c <= b and d <= k and (c, d) != (b, k) for c, d in figures)]


def sweet_spot(points: Sequence[Point], target: float) -> Point | None:
    """The smallest cache with at most `target` KL (nats per token), of points in the order of `sweep`; None where there is none."""
    return next((p for p in points if p["kl"] <= target), None)


def plot(points: Sequence[Point], path: Path) -> None:
    """KL against bits into a PNG file, the Pareto-optimal settings joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    best = [p for p in points if p["pareto"]]
    for p in points:
        colour = "tab:red" if p["pareto"] else "tab:grey"
        axes.errorbar(p["bits"], p["kl"], p["kl_se"], fmt="o", color=colour, capsize=3)
        axes.annotate(p["label"], (p["bits"], p["kl"]), (7, 3), textcoords="offset points", color=colour, fontsize=8)
    axes.step([p["bits"] for p in best], [p["kl"] for p in best], where="post", color="tab:red", alpha=0.5)
    axes.set(xlabel="bits per element, all-in", ylabel="KL in nats per token", yscale="log", xmargin=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
