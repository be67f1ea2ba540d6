"""What is stored comes back or is not there; nothing raises."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from spectralquant.home import folder_bytes
from spectralquant.kernels.disk_cache import cache_folder, read_cubin, write_cubin


def test_read_cubin_gives_what_write_cubin_stored(cache_home: Path) -> None:
    assert read_cubin("key") is None and folder_bytes(cache_folder()) == 0
    write_cubin("key", b"first")
    write_cubin("key", b"second")
    assert read_cubin("key") == b"second" and read_cubin("other") is None
    assert [f.name for f in (cache_home / "spectralquant" / "kernels").iterdir()] == ["key.cubin"]
    assert folder_bytes(cache_folder()) == 32 + len(b"second")


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"?" + b[41:], lambda b: b + b"\0", lambda b: b"x" * len(b)])
def test_read_cubin_finds_damage(damage: Callable[[bytes], bytes], cache_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_cubin("key", b"0123456789" * 10)
    file = cache_home / "spectralquant" / "kernels" / "key.cubin"
    file.write_bytes(damage(file.read_bytes()))
    assert read_cubin("key") is None
    assert "damaged" in caplog.text


def test_write_cubin_goes_on_without_a_writable_folder(cache_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file stands where the folder should be: no user, root included, can write there. One warning, however many kernels."""
    cache_home.write_text("not a folder")
    for key in ("one", "two"):
        write_cubin(key, b"cubin")
        assert read_cubin(key) is None
    assert [r.levelno for r in caplog.records if str(cache_home) in r.message] == [logging.WARNING]
    assert folder_bytes(cache_folder()) == 0


def test_write_cubin_leaves_nothing_aside_when_the_disk_is_full(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    write_cubin("key", b"cubin")
    assert list((cache_home / "spectralquant" / "kernels").iterdir()) == []


def test_write_cubin_goes_on_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    write_cubin("key", b"cubin")
    assert cache_folder() is None and read_cubin("key") is None and folder_bytes(cache_folder()) == 0
    assert "no home folder" in caplog.text
