"""Compiled kernels on disk, shared by all processes of a user.

A file is the SHA-256 of a cubin followed by the cubin. It is written aside and renamed, so a reader sees a whole file or none, whoever else
writes it at that moment; the checksum finds what a crash of the machine or a bad disk leaves. Nothing here raises: without a cache
everything is compiled again.
"""

import hashlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

from spectralquant.home import home_folder

_DIGEST_BYTES = hashlib.sha256().digest_size
_log = logging.getLogger("spectralquant")


def cache_folder() -> Path | None:
    """Where compiled kernels are kept, or None for a user without a home."""
    home = home_folder()
    return None if home is None else home / "kernels"


def read_cubin(key: str) -> bytes | None:
    """The cubin stored under `key`, or None if there is none or it is damaged."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        stored = (folder / f"{key}.cubin").read_bytes()
    except OSError:
        return None
    digest, cubin = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if hashlib.sha256(cubin).digest() == digest:
        return cubin
    _log.warning("cached kernel %s in %s is damaged; it is compiled again", key, folder)
    return None


def write_cubin(key: str, cubin: bytes) -> None:
    """Store `cubin` under `key`, replacing what is there."""
    folder = cache_folder()
    if folder is None:
        _warn_once("this user has no home folder and SPECTRALQUANT_HOME is not set: CUDA kernels are compiled again in every process")
        return
    try:
        _replace(folder / f"{key}.cubin", hashlib.sha256(cubin).digest() + cubin)
    except OSError as error:
        _warn_once(f"no compiled CUDA kernels can be kept in {folder} ({error.strerror}): they are compiled again in every process")


def _replace(target: Path, content: bytes) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # code that will run: nobody else may write it
    descriptor, aside = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(aside).replace(target)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)
