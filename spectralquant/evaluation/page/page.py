"""From the folder of a run to one HTML file: what is there is shown, what is not is named with the command that makes it."""

import os
from importlib.resources import files
from pathlib import Path

from spectralquant.errors import ConfigError, ProfileError
from spectralquant.evaluation.methods.ours import CALIBRATION
from spectralquant.evaluation.page.run import Run
from spectralquant.evaluation.page.sections import sections_of
from spectralquant.evaluation.page.top import facts_of, headline, key_figures, legend, scored_context
from spectralquant.evaluation.plots.style import require_matplotlib, settings
from spectralquant.evaluation.report import build_report
from spectralquant.evaluation.run_files import BENCH, CONFIG, read_bench
from spectralquant.files import write_text
from spectralquant.profile import load_profile
from spectralquant.version import __version__

PAGE = "report.html"
_TEMPLATE, _SHEET = "page.html.jinja", "page.css"


def write_page(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run and return its path. The same run gives the same bytes; a browser that opens them asks no network for anything.

    Args:
        folder: As `spectralquant evaluate` and `spectralquant bench` fill it with `--out`.
        out: The file; None for report.html in the folder.

    Raises:
        ConfigError: The folder holds neither an evaluation nor a bench, something in it can't be read, the file can't be written, or jinja2 or matplotlib is
            not installed.
    """
    target = Path(folder) / PAGE if out is None else Path(out)
    run = read_run(Path(folder))
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"out={os.fspath(target)!r}: there is no folder {os.fspath(target.parent)!r}; make it first")
    write_text(target, render(run))
    return target


def read_run(folder: Path) -> Run:
    """What `folder` holds of the parts of a run.

    Raises:
        ConfigError: Neither an evaluation nor a bench, or files that can't be read.
    """
    report = build_report(folder) if (folder / CONFIG).is_file() else None
    bench = read_bench(folder / BENCH) if (folder / BENCH).is_file() else None
    if report is None and bench is None:
        raise ConfigError(
            f"{folder} has neither {CONFIG} nor {BENCH}: expected the folder of a run; make one with `spectralquant evaluate MODEL --out {folder}` or "
            f"`spectralquant bench MODEL --out {folder}`"
        )
    try:
        profile = load_profile(folder / CALIBRATION) if (folder / CALIBRATION).is_file() else None
    except ProfileError as error:
        raise ConfigError(f"the calibration of the run can't be read: {error}; remove the file, or run again") from error
    return Run(folder.absolute().name, report, bench, profile)


def render(run: Run) -> str:
    """The page as text."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ConfigError('the page needs jinja2, which is not installed; run: pip install "spectralquant[report]"') from error
    require_matplotlib()
    here = files("spectralquant.evaluation.page")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((here / _TEMPLATE).read_text(encoding="utf-8"))
    with settings():
        sections = sections_of(run)
    return template.render(
        run=run, headline=headline(run), facts=facts_of(run), figures=key_figures(run), context=scored_context(run), sections=sections, legend=legend(run),
        sheet=(here / _SHEET).read_text(encoding="utf-8"), version=__version__,
    )  # fmt: skip
