"""Every test of kernels has a cache folder of its own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What XDG_CACHE_HOME names; it does not exist yet."""
    home = tmp_path / "cache"
    monkeypatch.delenv("SPECTRALQUANT_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home
