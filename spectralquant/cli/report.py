"""`spectralquant report`: a run as one page."""

from pathlib import Path
from typing import Annotated

import typer

from spectralquant.cli.options import Json


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that evaluate or bench wrote with --out.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page. Default: report.html in the folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write a run as one HTML page: tables, spectra, bits, KL, memory and speed. It asks no network for anything.

    \b
    spectralquant report run
    spectralquant report run --out page.html
    """
    from spectralquant.cli.output import Output
    from spectralquant.evaluation.page.page import write_page

    page, say = write_page(run, out), Output(as_json)
    say.say(f"written to {page}")
    say.document({"run": str(run), "page": str(page), "bytes": page.stat().st_size})
