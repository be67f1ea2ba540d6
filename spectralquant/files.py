"""Files that are there in full or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Written aside and renamed: a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, document: Any) -> None:
    """Indented, written as `write_text` does."""
    write_text(path, json.dumps(document, indent=1) + "\n")
