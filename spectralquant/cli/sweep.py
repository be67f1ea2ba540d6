"""`spectralquant sweep`: size against divergence, and the smallest cache for a quality that you name."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from spectralquant.cli.options import DEMO, Calibration, DType, Json, Model, NoCache, PresetList
from spectralquant.errors import ConfigError


def sweep(
    model: Model = DEMO,
    preset: PresetList = None,
    dials: Annotated[bool, typer.Option("--dials", help="Settings of avg_bits, noise_bits and value_noise_bits too.")] = False,
    target_kl: Annotated[float | None, typer.Option(metavar="NATS", help="Name the smallest cache with at most this KL; exit 1 if none.")] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="NAME=SOURCE", help="As in evaluate. Default: prose and code that come with Python.")] = None,
    context: Annotated[int, typer.Option(metavar="TOKENS", help="In the cache before scoring; up to 192 stay exact.")] = 512,
    windows: Annotated[int, typer.Option(help="Per text.")] = 8,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw KL against bits into this PNG file.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the run; an interrupted one goes on there. Default: a temporary one.")] = None,
    calibration: Calibration = None,
    dtype: DType = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Measure size and KL of presets and dials; * marks those that no other beats in both.

    \b
    spectralquant sweep --target-kl 0.01
    spectralquant sweep path/to/model --dials --plot sweep.png --text mine=book.txt
    """
    from dataclasses import replace

    from spectralquant.cli.evaluate import command_line, named_text
    from spectralquant.cli.models import load_model
    from spectralquant.cli.output import Output
    from spectralquant.cli.session import require_calibration, require_presets
    from spectralquant.evaluation import sweep as sweeping
    from spectralquant.evaluation.methods import Subject
    from spectralquant.evaluation.plan import DEFAULT_TEXTS, Plan
    from spectralquant.evaluation.plots.style import require_matplotlib

    if target_kl is not None and not target_kl > 0:
        raise ConfigError(f"--target-kl {target_kl}: expected a positive number of nats per token")
    if plot is not None:
        require_matplotlib()
    settings, texts = sweeping.settings_for(require_presets(preset), dials), dict(map(named_text, text)) if text else DEFAULT_TEXTS
    plan = Plan("", tuple(method.name for method in settings), texts=dict(texts), contexts=(context,), windows=windows)
    file = require_calibration(calibration)
    loaded, tokenizer, label = load_model(model, dtype)
    with tempfile.TemporaryDirectory() as scratch:
        subject = Subject(loaded, tokenizer, out or Path(scratch), file, not no_cache)
        points = sweeping.sweep(settings, replace(plan, model=label), subject, command_line())
    say = Output(as_json)
    rows = [(f"{'*' if p['pareto'] else ' '} {p['label']}", f"{p['bits']:.2f}", f"{16 / p['bits']:.2f}x", f"{p['kl']:.4f} ± {p['kl_se']:.4f}") for p in points]
    say.table(f"{label}, {context:,} tokens of context", ("setting", "bits", "ratio", "KL, nats per token"), rows, "* no other is smaller with as little KL")
    if plot is not None:
        sweeping.plot(points, plot)
        say.say(f"drawn into {plot}")
    spot = None if target_kl is None else sweeping.sweet_spot(points, target_kl)
    if spot is not None:
        say.say(f"smallest cache with KL <= {target_kl:g}: {spot['label']}, {spot['bits']:.2f} bits, KL {spot['kl']:.4f}", style="bold")
    elif target_kl is not None:
        say.say(f"no setting has KL <= {target_kl:g}; the least is {min(p['kl'] for p in points):.4f}", style="bold")
    say.document({"model": label, "points": points, "target_kl": target_kl, "sweet_spot": None if spot is None else spot["name"]})
    if target_kl is not None and spot is None:
        raise typer.Exit(1)
