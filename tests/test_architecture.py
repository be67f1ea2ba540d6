"""Promises about the package itself."""

import subprocess
import sys
from importlib.resources import files

import spectralquant


def test_import_is_lean() -> None:
    """`import spectralquant` loads neither torch nor transformers."""
    code = "import sys, spectralquant; print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    for name in spectralquant.__all__:
        assert getattr(spectralquant, name) is not None


def test_package_data_is_there() -> None:
    root = files("spectralquant") / "data"
    assert len(list((root / "corpus").iterdir())) == 64 and len(list((root / "prompts").iterdir())) == 4
