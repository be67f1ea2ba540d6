"""Includes are put in once, from the folder alone, and line numbers survive."""

from pathlib import Path

import pytest

from spectralquant.errors import BackendError
from spectralquant.kernels.sources import SOURCES, read_source


def numbered(text: str) -> dict[str, tuple[str, int]]:
    """Line -> (file, number) as a compiler counts after `#line` directives."""
    places, file, number = {}, "", 0
    for line in text.split("\n"):
        if line.startswith("#line"):
            _, start, name = line.split()
            file, number = name.strip('"'), int(start)
        else:
            places[line], number = (file, number), number + 1
    return places


def test_read_source_puts_each_file_in_once_with_its_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text('// a1\n#include "b.cuh"\n#include "c.cuh"  // why\n// a4\n')
    (tmp_path / "b.cuh").write_text('// b1\n # include "c.cuh"\n// b3\n')
    (tmp_path / "c.cuh").write_text("// c1")
    text = read_source("a.cu", tmp_path)
    places = numbered(text)
    assert {line: places[line] for line in ("// a1", "// b1", "// c1", "// b3", "// a4")} == {
        "// a1": ("a.cu", 1), "// b1": ("b.cuh", 1), "// c1": ("c.cuh", 1), "// b3": ("b.cuh", 3), "// a4": ("a.cu", 4),
    }  # fmt: skip
    assert text.count("// c1") == 1 and "include" not in text


@pytest.mark.parametrize("name", ["nowhere.cuh", "../errors.py", "/etc/hosts", ""])
def test_read_source_rejects_files_that_are_not_in_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text(f'#include "{name}"\n')
    with pytest.raises(BackendError, match="is not in"):
        read_source("a.cu", tmp_path)
    with pytest.raises(BackendError, match="is not in"):
        read_source(name)


def test_sources_of_the_package_include_nothing_from_outside() -> None:
    for file in SOURCES.glob("*.cu"):
        assert "#include" not in read_source(file.name)
