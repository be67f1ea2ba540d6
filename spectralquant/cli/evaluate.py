"""`spectralquant evaluate`: a plan from the command line, the run, its report."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spectralquant.cli.options import DEMO, Calibration, DType, Json, Model, NoCache
from spectralquant.errors import ConfigError

DEFAULT_METHODS = (
    "fp16", "fp8", "q8_0", "q4_0", "kivi4-g32", "kivi4-g128", "kivi2-g32", "kivi2-g128", "rotation2", "rotation3", "rotation4",
    "pca2", "pca2.375", "pca3", "standard", "high", "max", "ultra",
)  # fmt: skip
TASKS = ("language", "needles", "problems")


def evaluate(
    model: Model = DEMO,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the run; an interrupted run goes on there.")] = None,
    method: Annotated[list[str] | None, typer.Option(metavar="NAME", help="May be repeated; `list` prints all. Default: a wide choice.")] = None,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME", help=f"One of {', '.join(TASKS)}; may be repeated. Default: language.")] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="NAME=SOURCE", help="A file, a .jsonl file, or stdlib:module,module; may be repeated.")] = None,
    context: Annotated[list[int] | None, typer.Option(metavar="TOKENS", help="In the cache before scoring; may be repeated. Default: 512 and 2048.")] = None,
    windows: Annotated[int | None, typer.Option(help="Per text and context. Default: 8.")] = None,
    scored: Annotated[int | None, typer.Option(help="Scored tokens per window. Default: 256.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens fed at a time while scoring, 1 to 16. Default: 16.")] = None,
    needle_length: Annotated[list[int] | None, typer.Option(metavar="TOKENS", help="Of the haystack; may be repeated.")] = None,
    needle_depth: Annotated[list[float] | None, typer.Option(metavar="SHARE", help="Place of the needle, 0 to 1; may be repeated.")] = None,
    needle_kind: Annotated[list[str] | None, typer.Option(metavar="KIND", help="sentence, key-value or multi-key; may be repeated.")] = None,
    needle_samples: Annotated[int | None, typer.Option(help="Needles per kind, length and depth. Default: 4.")] = None,
    problems: Annotated[int | None, typer.Option(help="Word problems. Default: 100.")] = None,
    problem_file: Annotated[str | None, typer.Option(metavar="FILE", help='JSON lines: "question", "answer" ending in "#### 42". Default: made up.')] = None,
    seed: Annotated[int | None, typer.Option(help="Of windows, needles and made-up problems. Default: 0.")] = None,
    calibration: Calibration = None,
    dtype: DType = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Measure KL, retrieval and word problems for this package and its peers on the same windows.

    \b
    spectralquant evaluate --out run
    spectralquant evaluate path/to/model --out run --text prose=book.txt --context 2048 --method fp16 --method kivi4-g128 --method high
    spectralquant evaluate --method list
    """
    from spectralquant.cli.models import load_model
    from spectralquant.cli.output import Output
    from spectralquant.cli.session import require_calibration
    from spectralquant.evaluation.methods import Subject, find_method
    from spectralquant.evaluation.plan import Plan
    from spectralquant.evaluation.report import write_report
    from spectralquant.evaluation.runner import run
    from spectralquant.evaluation.tasks import find_task

    say, methods = Output(as_json), tuple(method or DEFAULT_METHODS)
    if "list" in methods:
        return _list_methods(say)
    if out is None:
        raise ConfigError("--out is missing; expected the folder for the run, for example --out run")
    for name in methods:
        find_method(name)
    for name in task or ():
        find_task(name)
    chosen = {
        "tasks": task, "contexts": context, "windows": windows, "scored": scored, "chunk": chunk,
        "needle_lengths": needle_length, "needle_depths": needle_depth, "needle_kinds": needle_kind,
        "needle_samples": needle_samples, "problems": problems, "problem_file": problem_file, "seed": seed,
    }  # fmt: skip
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items() if v is not None}
    if text:
        settings["texts"] = dict(named_text(pair) for pair in text)
    Plan(model="", methods=methods, **settings)  # bad settings are refused before a model is loaded
    file = require_calibration(calibration)
    loaded, tokenizer, label = load_model(model, dtype)
    run(Plan(model=label, methods=methods, **settings), Subject(loaded, tokenizer, out, file, not no_cache), command_line())
    report = write_report(out)
    report.print(say.console)
    say.say(f"\nwritten to {out}; spectralquant report {out} makes a page of it")
    return say.document(report.as_json())


def _list_methods(out: Any) -> None:
    from spectralquant.evaluation.methods import METHODS

    for method in METHODS.values():
        out.say(f"{method.name:16}{method.label}{' (size counted, codes simulated)' if method.simulated else ''}")
    out.document([{"name": m.name, "label": m.label, "simulated": m.simulated} for m in METHODS.values()])


def named_text(text: str) -> tuple[str, str]:
    """(name, source) of "NAME=SOURCE"."""
    name, separator, source = text.partition("=")
    if not separator or not name or not source:
        raise ConfigError(f"--text {text}: expected NAME=SOURCE, for example --text prose=book.txt")
    return name, source


def command_line() -> str:
    """The command line with folders of absolute paths left out."""
    return " ".join(["spectralquant", *(re.sub("(^|=)/.*/", r"\1", argument) for argument in sys.argv[1:])])
