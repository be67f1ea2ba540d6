"""Run the notebooks of this folder again and write them back, so that a change of their outputs is a change of what they show.

    python notebooks/execute.py
    python notebooks/execute.py spectralquant_demo.ipynb

Outputs hold no times, no progress bars and no state of widgets.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
PARAMETERS = "parameters"
"""Tag of the cell that others may override."""
WIDGET = "application/vnd.jupyter.widget-view+json"


def main(argv: Sequence[str] | None = None) -> int:
    """Execute and write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="*", help="names in this folder; default: all")
    args = parser.parse_args(argv)
    for path in [FOLDER / name for name in args.notebook] or sorted(FOLDER.glob("*.ipynb")):
        if not path.is_file():
            parser.error(f"{path.name}: there is no such notebook in {FOLDER.name}/")
        try:
            nbformat.write(execute(path), path)
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 1
    return 0


def execute(path: Path, values: Mapping[str, Any] | None = None) -> NotebookNode:
    """The notebook with outputs of a run just made, in its folder; `values` replace names of the cell of parameters.

    Raises:
        CellExecutionError: A cell failed.
        KeyError: The cell of parameters sets no such name.
    """
    notebook = nbformat.read(path, as_version=4)
    if values:
        set_parameters(notebook, values)
    # Times of cells and states of widgets would differ from run to run.
    NotebookClient(notebook, timeout=None, record_timing=False, store_widget_state=False, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_progress(output)]
    notebook.metadata.language_info = {"name": "python"}  # without the version that ran it
    return notebook


def set_parameters(notebook: NotebookNode, values: Mapping[str, Any]) -> None:
    """Replace values in the cell of parameters, in place."""
    cell = next(cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", ()))
    lines = cell.source.splitlines()
    for name, value in values.items():
        places = [i for i, line in enumerate(lines) if line.split("=")[0].strip() == name]
        if not places:
            raise KeyError(name)
        lines[places[0]] = f"{name} = {value!r}"
    cell.source = "\n".join(lines)


def is_progress(output: NotebookNode) -> bool:
    """Whether an output is of a progress bar: a widget, or text on stderr that goes back to the beginning of its line, or the line's end alone."""
    if output.output_type == "stream":
        return output.name == "stderr" and ("\r" in output.text or not output.text.strip())
    return WIDGET in output.get("data", ())


if __name__ == "__main__":
    sys.exit(main())
