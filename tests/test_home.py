"""Where files of a user are kept."""

from pathlib import Path

import pytest

from spectralquant.home import folder_bytes, home_folder


def test_spectralquant_home_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home_folder() == tmp_path / "xdg" / "spectralquant"
    monkeypatch.setenv("SPECTRALQUANT_HOME", str(tmp_path / "own"))
    assert home_folder() == tmp_path / "own"


def test_relative_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG's are ignored, as its specification says; ours is where the process runs, `~` is the user's home."""
    monkeypatch.delenv("SPECTRALQUANT_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("relative/folder", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert home_folder() == tmp_path / ".cache" / "spectralquant"
    monkeypatch.setenv("SPECTRALQUANT_HOME", "~/kept")
    assert home_folder() == tmp_path / "kept"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECTRALQUANT_HOME", "here")
    assert home_folder() == tmp_path / "here"


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SPECTRALQUANT_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert home_folder() is None


def test_folder_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "b").write_bytes(bytes(7))
    assert folder_bytes(tmp_path) == 17 and folder_bytes(tmp_path / "nowhere") == 0 and folder_bytes(None) == 0
