"""Perplexity, and divergence from the uncompressed model, of FP16 and of this package's presets on the same windows of text.

    python examples/run_perplexity.py
    python examples/run_perplexity.py --model path/or/name --preset high --text prose=book.txt --context 2048
    python examples/run_perplexity.py --calibration smollm2.safetensors --out runs/smollm2

Other methods and tasks: `spectralquant evaluate`.
"""

import argparse
import json
import math
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
from spectralquant.evaluation.metrics import summarise_language
from spectralquant.evaluation.plan import DEFAULT_TEXTS, Plan
from spectralquant.evaluation.runner import CONFIG, run
from spectralquant.presets import PRESETS
from spectralquant.profile import with_suffix

Row = dict[str, Any]
NOTE = """
bits: per element of the packed history, all-in; ratio: 16 / bits. ppl plain: perplexity of the uncompressed model; ppl: with the method's cache.
KL in nats per scored token against the uncompressed model, ± its standard error over windows."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    methods = tuple(dict.fromkeys(("fp16", *(args.preset or PRESETS))))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            rows = measure(args, methods, Path(args.out or scratch), shlex.join(["python", "examples/run_perplexity.py", *arguments]))
    except SpectralQuantError as error:
        print(f"run_perplexity: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print_table(rows, methods)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, GGUF file or hub name; default: SmolLM2-135M-Instruct from the demo extra")
    parser.add_argument("--preset", action="append", choices=list(PRESETS), help="preset to measure (may be repeated); default: all")
    text_help = "text to score (may be repeated): a file, a .jsonl file, or stdlib:module,module; default: prose and code that come with Python"
    parser.add_argument("--text", action="append", type=named_text, metavar="NAME=SOURCE", help=text_help)
    parser.add_argument("--context", type=int, default=512, metavar="TOKENS", help="tokens in the cache before scoring; up to 192 stay exact (default 512)")
    parser.add_argument("--windows", type=int, default=8, help="windows per text (default 8)")
    parser.add_argument("--calibration", metavar="FILE", help="of the model: loaded if it exists, else written; default: made in the run's folder")
    parser.add_argument("--out", metavar="DIR", help="folder of the run; an interrupted run goes on there; default: a temporary one")
    return parser


def named_text(argument: str) -> tuple[str, str]:
    """NAME=SOURCE in two."""
    name, _, source = argument.partition("=")
    if not name or not source:
        raise argparse.ArgumentTypeError(f"{argument!r}: expected NAME=SOURCE, for example prose=book.txt")
    return name, source


def measure(args: argparse.Namespace, methods: tuple[str, ...], folder: Path, command: str) -> list[Row]:
    """One row per window and method, see `evaluation.tasks.language`; `folder` keeps them."""
    plan = Plan("", methods, texts=dict(args.text or DEFAULT_TEXTS), contexts=(args.context,), windows=args.windows)  # refuses before a model is loaded
    model, tokenizer, label = load_model(args.model)
    rows = run(replace(plan, model=label), Subject(model, tokenizer, folder, with_suffix(args.calibration) if args.calibration else None), command)
    if failed := json.loads((folder / CONFIG).read_text(encoding="utf-8"))["unavailable"]:
        raise ConfigError(f"{', '.join(failed)} could not be prepared: {'; '.join(dict.fromkeys(failed.values()))}")
    return rows


def print_table(rows: Sequence[Row], methods: Sequence[str]) -> None:
    """A line per text and method. The folder may hold rows of other tasks and methods: they are left out."""
    texts = dict.fromkeys(row["text"] for row in rows if row["task"] == "language")
    width = max(map(len, texts))
    print(f"{'text':{width}}  {'method':22}{'bits':>6}{'ratio':>7}{'ppl plain':>11}{'ppl':>11}{'ppl ratio':>11}{'KL':>18}{'same token':>12}")
    for text in texts:
        for method in methods:
            mine = [row for row in rows if (row["task"], row.get("text"), row["method"]) == ("language", text, method)]
            s = summarise_language(mine)
            sizes = f"{s['bits']:6.2f}{16 / s['bits']:6.2f}x"
            perplexities = f"{perplexity(mine, 'nll_plain'):11.3f}{perplexity(mine, 'nll'):11.3f}{s['perplexity_ratio']:11.4f}"
            print(f"{text:{width}}  {METHODS[method].label:22}{sizes}{perplexities}{s['kl']:9.4f} ± {s['kl_se']:.4f}{100 * s['agreement']:10.1f} %")
    print(NOTE)


def perplexity(rows: Sequence[Row], column: str) -> float:
    """exp of the mean negative log-likelihood in `column`; all windows have the same number of tokens."""
    nll = [value for row in rows for value in row[column]]
    return math.exp(math.fsum(nll) / len(nll))


if __name__ == "__main__":
    sys.exit(main())
