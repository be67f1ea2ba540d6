"""The notebook runs, and what is committed is what a run gives."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import torch
from example_scripts import ROOT, script
from nbformat import NotebookNode

PATH = ROOT / "notebooks" / "spectralquant_demo.ipynb"
SHORT = {"NEW_TOKENS": 4, "N_PROMPTS": 1, "N_TEXTS": 2, "COMPARED": ["high"]}
"""A test's worth of the cell of parameters."""
IDENTICAL = "tokens and logits identical to the bit: True"
A_PATH = re.compile(r"(?<![\w./<])/(?:bin|content|home|mnt|opt|private|root|tmp|usr|Users|var|work)/|\b[A-Z]:\\")


@pytest.mark.real
def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRALQUANT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    ran = script("execute", "notebooks").execute(PATH, SHORT)
    assert_clean(ran)
    assert text_of(ran).count(IDENTICAL) == 2
    assert len(list((tmp_path / "home" / "calibrations").glob("*.safetensors"))) == 2  # the bundled corpus and the user's texts


def test_committed_outputs() -> None:
    """Of a whole run from top to bottom, without traces of the machine."""
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    assert_clean(notebook)
    text = text_of(notebook)
    assert not A_PATH.search(text + "".join(cell.source for cell in notebook.cells))
    assert text.count(IDENTICAL) == 2
    for title in ("report", "code", "maths", "dialogue"):
        assert f"**{title}**" in text
    assert sum("image/png" in output.get("data", ()) for output in outputs(notebook)) == 1


def test_values_replace_parameters() -> None:
    execute = script("execute", "notebooks")
    notebook = nbformat.read(PATH, as_version=4)
    execute.set_parameters(notebook, SHORT)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    values: dict[str, object] = {}
    exec(cell.source, values)
    assert {name: values[name] for name in ("MODEL", *SHORT)} == {"MODEL": "smollm2", **SHORT}
    with pytest.raises(KeyError, match="NO_SUCH"):
        execute.set_parameters(notebook, {"NO_SUCH": 1})


def test_progress_is_no_output_but_a_warning_is() -> None:
    execute = script("execute", "notebooks")
    bar = nbformat.v4.new_output("stream", name="stderr", text="calibrating:   0%|\rcalibrating: 100%|")
    end = nbformat.v4.new_output("stream", name="stderr", text="\n")
    widget = nbformat.v4.new_output("display_data", data={execute.WIDGET: {}, "text/plain": "0%"})
    warning = nbformat.v4.new_output("stream", name="stderr", text="UserWarning: few tokens\n")
    said = nbformat.v4.new_output("stream", name="stdout", text="a\rb")
    assert [execute.is_progress(output) for output in (bar, end, widget, warning, said)] == [True, True, True, False, False]


def assert_clean(notebook: NotebookNode) -> None:
    """Every code cell ran once, in order; no errors, no warnings; nothing but tags in metadata."""
    cells = code_cells(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.keys() == {"kernelspec", "language_info"} and notebook.metadata.language_info == {"name": "python"}
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.metadata.keys() <= {"tags"} for cell in notebook.cells)
    assert [cell.metadata.get("tags") for cell in cells if not cell.outputs] == [["install"], ["parameters"]]
    assert not [output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    return (output for cell in code_cells(notebook) for output in cell.outputs)


def text_of(notebook: NotebookNode) -> str:
    """All that outputs say in letters."""
    return "\n".join(text for o in outputs(notebook) for text in (o.get("text", ""), *(v for k, v in o.get("data", {}).items() if k.startswith("text/"))))
