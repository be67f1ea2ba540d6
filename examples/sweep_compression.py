"""Size against divergence: presets, and with --dials a few settings of the engine's dials, measured on the same windows of text.

    python examples/sweep_compression.py --model path/or/name --target-kl 0.01
    python examples/sweep_compression.py --dials --plot sweep.png --calibration smollm2.safetensors

Settings marked * are Pareto-optimal by their means: no other is as small with less KL, or smaller with no more KL.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectralquant.cli.models import load_model
from spectralquant.errors import ConfigError, SpectralQuantError
from spectralquant.evaluation.methods import METHODS, Subject
from spectralquant.evaluation.methods.ours import method_for
from spectralquant.evaluation.metrics import summarise_language
from spectralquant.evaluation.plan import Plan
from spectralquant.evaluation.plots.style import require_matplotlib
from spectralquant.evaluation.runner import CONFIG, run
from spectralquant.presets import PRESETS
from spectralquant.profile import with_suffix

DIALS = tuple(  # bits per leading coordinate on average, and per coordinate of the tails of K and of V
    method_for(f"dials-{avg}-{k}-{v}", f"avg {avg}, tails K {k} V {v}", total_bits=avg, noise_bits=k, value_noise_bits=v)
    for avg, k, v in ((2, 0, 2), (2, 2, 2), (3, 0, 0), (3, 0, 2), (3, 2, 2), (4, 0, 0), (4, 2, 2))
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and plot; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            points = measure(args, Path(args.out or scratch), shlex.join(["python", "examples/sweep_compression.py", *arguments]))
    except SpectralQuantError as error:
        print(f"sweep_compression: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    best = pareto(points)
    for p in points:
        print(f"{'*' if p in best else ' '} {p['label']:24}{p['bits']:6.2f} bits{16 / p['bits']:7.2f}x   KL {p['kl']:.4f} ± {p['kl_se']:.4f}")
    if args.target_kl is not None:
        print(describe_target(points, args.target_kl))
    if args.plot:
        plot(points, best, Path(args.plot))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, GGUF file or hub name; default: SmolLM2-135M-Instruct from the demo extra")
    parser.add_argument("--preset", action="append", choices=list(PRESETS), help="preset to measure (may be repeated); default: all")
    parser.add_argument("--dials", action="store_true", help="measure settings of avg_bits, noise_bits and value_noise_bits too")
    parser.add_argument("--target-kl", type=float, metavar="NATS", help="name the smallest cache with at most this KL")
    parser.add_argument("--plot", metavar="FILE", help="draw KL against bits into this PNG file")
    parser.add_argument("--context", type=int, default=512, metavar="TOKENS", help="tokens in the cache before scoring; up to 192 stay exact (default 512)")
    parser.add_argument("--windows", type=int, default=8, help="windows of prose and of code that come with Python (default 8 each)")
    parser.add_argument("--calibration", metavar="FILE", help="of the model: loaded if it exists, else written; default: made in the run's folder")
    parser.add_argument("--out", metavar="DIR", help="folder of the run; an interrupted run goes on there; default: a temporary one")
    return parser


def measure(args: argparse.Namespace, folder: Path, command: str) -> list[dict[str, Any]]:
    """A point per setting, the smallest cache first: its label and `metrics.summarise_language` over all windows. `folder` keeps the rows."""
    if args.target_kl is not None and not args.target_kl > 0:
        raise ConfigError(f"--target-kl {args.target_kl}: expected a positive number of nats per token")
    if args.plot:
        require_matplotlib()
    settings = [METHODS[name] for name in dict.fromkeys(args.preset or PRESETS)] + list(DIALS) * args.dials
    METHODS.update((method.name, method) for method in settings)  # where the runner looks them up
    plan = Plan("", tuple(method.name for method in settings), contexts=(args.context,), windows=args.windows)  # refuses before a model is loaded
    model, tokenizer, label = load_model(args.model)
    rows = run(replace(plan, model=label), Subject(model, tokenizer, folder, with_suffix(args.calibration) if args.calibration else None), command)
    if failed := json.loads((folder / CONFIG).read_text(encoding="utf-8"))["unavailable"]:
        raise ConfigError(f"{', '.join(failed)} could not be prepared: {'; '.join(dict.fromkeys(failed.values()))}")
    points = ({"label": m.label, **summarise_language([r for r in rows if (r["task"], r["method"]) == ("language", m.name)])} for m in settings)
    return sorted(points, key=lambda p: (p["bits"], p["kl"]))


def pareto(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other point beats in bits or KL without losing in the other."""
    figures = [(p["bits"], p["kl"]) for p in points]
    return [p for p, (b, k) in zip(points, figures, strict=True) if not any(c <= b and d <= k and (c, d) != (b, k) for c, d in figures)]


def describe_target(points: Sequence[dict[str, Any]], target: float) -> str:
    """The smallest cache (the first one of `points`) with at most `target` KL, or that there is none."""
    for p in points:
        if p["kl"] <= target:
            return f"smallest cache with KL <= {target:g}: {p['label']}, {p['bits']:.2f} bits, KL {p['kl']:.4f}"
    return f"no setting has KL <= {target:g}; the least is {min(p['kl'] for p in points):.4f}"


def plot(points: Sequence[dict[str, Any]], best: Sequence[dict[str, Any]], path: Path) -> None:
    """KL against bits, the Pareto-optimal settings joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for p in points:
        colour = "tab:red" if p in best else "tab:grey"
        axes.errorbar(p["bits"], p["kl"], p["kl_se"], fmt="o", color=colour, capsize=3)
        axes.annotate(p["label"], (p["bits"], p["kl"]), (7, 3), textcoords="offset points", color=colour, fontsize=8)
    axes.step([p["bits"] for p in best], [p["kl"] for p in best], where="post", color="tab:red", alpha=0.5)
    axes.set(xlabel="bits per element, all-in", ylabel="KL in nats per token", yscale="log", xmargin=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    sys.exit(main())
