"""`spectralquant evaluate`: a plan from the command line, the run, its report."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from spectralquant.errors import ConfigError

DEFAULT_METHODS = (
    "fp16", "fp8", "q8_0", "q4_0", "kivi4-g32", "kivi4-g128", "kivi2-g32", "kivi2-g128", "rotation2", "rotation3", "rotation4",
    "pca2", "pca2.375", "pca3", "standard", "high", "max", "ultra",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`; unset ones keep the defaults of `evaluation.plan.Plan`."""
    parser.add_argument("model", nargs="?", help="folder, GGUF file or hub name; default: SmolLM2-135M-Instruct from the demo extra")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run; an interrupted run goes on there")
    parser.add_argument("--method", action="append", metavar="NAME", help="method (may be repeated; `--method list` prints all); default: a wide choice")
    parser.add_argument("--task", action="append", choices=["language", "needles", "problems"], help="may be repeated; default: language")
    parser.add_argument("--text", action="append", metavar="NAME=SOURCE", help="text to score: a file, a .jsonl file, or stdlib:module,module")
    parser.add_argument("--context", action="append", type=int, metavar="TOKENS", help="tokens in the cache before scoring (may be repeated)")
    parser.add_argument("--windows", type=int, help="windows per text and context (default 8)")
    parser.add_argument("--scored", type=int, help="scored tokens per window (default 256)")
    parser.add_argument("--chunk", type=int, help="tokens fed at a time while scoring, 1 to 16 (default 16)")
    parser.add_argument("--needle-length", action="append", type=int, metavar="TOKENS", help="haystack (may be repeated)")
    parser.add_argument("--needle-depth", action="append", type=float, metavar="SHARE", help="place of the needle, 0 to 1 (may be repeated)")
    parser.add_argument("--needle-kind", action="append", metavar="KIND", help="sentence, key-value or multi-key (may be repeated)")
    parser.add_argument("--needle-samples", type=int, help="needles per kind, length and depth (default 4)")
    parser.add_argument("--problems", type=int, help="number of word problems (default 100)")
    parser.add_argument("--problem-file", metavar="FILE", help='JSON lines with "question" and "answer" ending in "#### 42"; default: generated ones')
    parser.add_argument("--seed", type=int, help="of windows, needles and generated problems (default 0)")
    parser.add_argument("--calibration", metavar="FILE", help="calibration of the model; default: made in the run's folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the model; default: float32 on a CPU, bfloat16 on a GPU")


def run_evaluate(args: argparse.Namespace) -> int:
    """Run, print and write the report; returns the exit status."""
    from spectralquant.cli.models import load_model
    from spectralquant.evaluation.methods import METHODS, Subject, find_method
    from spectralquant.evaluation.plan import Plan
    from spectralquant.evaluation.report import write_report
    from spectralquant.evaluation.runner import run
    from spectralquant.profile import with_suffix

    if args.method and "list" in args.method:
        for method in METHODS.values():
            print(f"{method.name:16}{method.label}{' (size counted, codes simulated)' if method.simulated else ''}")
        return 0
    methods = tuple(args.method or DEFAULT_METHODS)
    for name in methods:
        find_method(name)
    chosen = {
        "tasks": args.task, "contexts": args.context, "windows": args.windows, "scored": args.scored, "chunk": args.chunk,
        "needle_lengths": args.needle_length, "needle_depths": args.needle_depth, "needle_kinds": args.needle_kind,
        "needle_samples": args.needle_samples, "problems": args.problems, "problem_file": args.problem_file, "seed": args.seed,
    }  # fmt: skip
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items() if v is not None}
    if args.text:
        settings["texts"] = dict(_named_text(text) for text in args.text)
    Plan(model="", methods=methods, **settings)  # bad settings are refused before a model is loaded
    calibration = None if args.calibration is None else with_suffix(args.calibration)
    if calibration is not None and not calibration.is_file():
        raise ConfigError(f"--calibration {args.calibration}: there is no such file; make one with engine.calibrate_to, or leave it out")
    model, tokenizer, label = load_model(args.model, args.dtype)
    plan = Plan(model=label, methods=methods, **settings)
    folder = Path(args.out)
    run(plan, Subject(model, tokenizer, folder, calibration), _command())
    write_report(folder).print()
    print(f"\nwritten to {folder}")
    return 0


def _named_text(text: str) -> tuple[str, str]:
    name, separator, source = text.partition("=")
    if not separator or not name or not source:
        raise ConfigError(f"--text {text}: expected NAME=SOURCE, for example --text prose=book.txt")
    return name, source


def _command() -> str:
    """The command line with folders of absolute paths left out."""
    return " ".join(["spectralquant", *(re.sub("(^|=)/.*/", r"\1", argument) for argument in sys.argv[1:])])
