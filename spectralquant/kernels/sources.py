"""The CUDA sources as text: a `.cu` file with its includes put in.

Includes are resolved here and not by the compiler, so what is hashed for the cache is exactly what is compiled, and no search path (the
working folder, a CUDA toolkit) can slip another file in. The price is a rule: an `#include "name.cuh"` is put in at its first occurrence and
nowhere else, so it belongs at the top of a file, never inside `#if`, and headers need no guard.
"""

import re
from pathlib import Path

from spectralquant.errors import BackendError

SOURCES = Path(__file__).parent
"""Folder of the package's `.cu` and `.cuh` files."""

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]*)"[^\n]*$', re.MULTILINE)


def read_source(name: str, folder: Path = SOURCES) -> str:
    """`folder / name` as one text, `#line` directives keeping file names and line numbers for the compiler's messages.

    Raises:
        BackendError: The file or one it includes is not in `folder`.
    """
    return _expand(name, folder, set())


def _expand(name: str, folder: Path, seen: set[str]) -> str:
    seen.add(name)
    text = _read(name, folder)
    parts, end = [f'#line 1 "{name}"\n'], 0
    for include in _INCLUDE.finditer(text):
        parts.append(text[end : include.start()])
        if include[1] not in seen:
            parts.append(_expand(include[1], folder, seen))
        end = include.end()
        following = text.count("\n", 0, end) + 2
        parts.append(f'\n#line {following} "{name}"')  # the rest begins with the line break that ends the #include
    parts.append(text[end:])
    return "".join(parts)


def _read(name: str, folder: Path) -> str:
    # A name with a folder in it could leave the package; nothing needs one.
    if Path(name).name != name or not (folder / name).is_file():
        raise BackendError(f"CUDA source {name!r} is not in {folder}: the installation is incomplete, or an #include names a file that is not shipped")
    return (folder / name).read_text(encoding="utf-8")
