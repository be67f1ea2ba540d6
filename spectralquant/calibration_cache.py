"""Calibrations of a user, kept between runs: the same call of `calibrate` measures once per machine and loads from then on.

A file is named by a digest over all that decides its content: the model's fingerprint, the token samples, and the settings. So nothing goes stale, and what is
found is what would have been measured. Processes that want the same calibration at once wait for the first; where nothing can be written or locked,
calibrations are made as if there were no cache, with a warning.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spectralquant.corpus import Samples
from spectralquant.errors import ProfileError
from spectralquant.home import home_folder
from spectralquant.profile import FORMAT_VERSION, Profile, differences, load_profile, read_fingerprint
from spectralquant.version import __version__

_log = logging.getLogger("spectralquant")


def calibrations_folder() -> Path | None:
    """Where calibrations are kept, or None for a user without a home."""
    home = home_folder()
    return None if home is None else home / "calibrations"


def digest_of(fingerprint: Mapping[str, Any], samples: Samples, settings: Mapping[str, Any]) -> str:
    """Names a calibration: equal where model, tokens and settings are, and the release that measures."""
    head = {"model": dict(fingerprint), "settings": dict(settings), "format": FORMAT_VERSION, "release": __version__}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True, default=str).encode())
    for part in (samples.statistics, samples.held_out):
        for tokens in part:
            digest.update(f"{tuple(tokens.shape)}".encode() + tokens.numpy().tobytes())
    return digest.hexdigest()[:32]


def remembered(digest: str, measure: Callable[[], Profile]) -> tuple[Profile, Path | None]:
    """The calibration called `digest`, by `measure()` unless it is kept already.

    Returns:
        It, and the file that it was read from (None: it was measured now).
    """
    folder = calibrations_folder()
    if folder is None:
        _log.warning("this user has no home folder and SPECTRALQUANT_HOME is not set: calibrations are not kept")
        return measure(), None
    path = folder / f"{digest}.safetensors"
    if (kept := _read(path)) is not None:
        return kept, path
    with _locked(path) as writable:
        if (kept := _read(path)) is not None:  # another process made it meanwhile
            return kept, path
        profile = measure()
        if writable:
            _write(path, profile)
    return profile, None


def find_kept(fingerprint: Mapping[str, Any]) -> tuple[Path, Profile] | None:
    """The newest kept calibration of the model with this fingerprint, whatever its texts and settings, or None.

    Only headers are read to find it. A file that can't be read is passed over, with a warning.
    """
    folder = calibrations_folder()
    for path in [] if folder is None else _newest_first(folder):
        try:
            kept = read_fingerprint(path)
            if kept and not differences(kept, dict(fingerprint)):
                return path, load_profile(path)
        except ProfileError as error:
            _log.warning("a kept calibration is passed over: %s", error)
    return None


def _newest_first(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    except OSError as error:  # the folder may be deleted at any time
        _log.warning("kept calibrations in %s can't be listed (%s)", folder, error.strerror)
        return []


def _read(path: Path) -> Profile | None:
    if not path.is_file():
        return None
    try:
        return load_profile(path)
    except ProfileError as error:
        _log.warning("a kept calibration can't be used, it is made again: %s", error)
        return None


def _write(path: Path, profile: Profile) -> None:
    try:
        profile.save(path)
    except OSError as error:
        _log.warning("the calibration can't be kept in %s (%s); set SPECTRALQUANT_HOME to a folder that can be written", path.parent, error.strerror)


@contextmanager
def _locked(path: Path) -> Generator[bool]:
    """Hold the lock of `path`. Yields whether it could be had at all: a folder may be read-only."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.warning("another process calibrates this model; waiting for it (%s)", lock.lock_file)
            lock.acquire()
    except OSError as error:
        _log.warning("calibrations can't be kept in %s (%s); set SPECTRALQUANT_HOME to a folder that can be written", path.parent, error.strerror or error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
