"""Files that are there in full or not at all, and JSON that every program reads."""

import json
import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Let errors of writing say which file: a full disk is noticed when a buffer goes out, where Python knows no name any more."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Written aside and renamed: a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, document: Any) -> None:
    """Indented, written as `write_text` does."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def plain(value: Any) -> Any:
    """Lists for tuples, and None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
