"""Where this package keeps files of a user between runs: calibrations and compiled kernels."""

import os
from pathlib import Path


def home_folder() -> Path | None:
    """`$SPECTRALQUANT_HOME`, else `$XDG_CACHE_HOME/spectralquant`, else `~/.cache/spectralquant`; None for a user without a home."""
    if own := os.environ.get("SPECTRALQUANT_HOME"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(base).is_absolute():  # also "": the XDG specification says to ignore relative paths
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return Path(base) / "spectralquant"


def folder_bytes(folder: Path | None) -> int:
    """Bytes of the files in `folder`; 0 where there is none."""
    total = 0
    try:
        for file in folder.iterdir() if folder else ():
            total += file.stat().st_size
    except OSError:  # no folder yet, not readable, or a file renamed meanwhile
        pass
    return total
