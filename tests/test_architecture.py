"""Promises about the package itself."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import spectralquant
from spectralquant.requirements import TRANSFORMERS

ROOT = Path(__file__).parents[1]


def test_import_is_lean() -> None:
    """`import spectralquant` loads neither torch nor transformers nor the CUDA packages."""
    code = "import sys, spectralquant; print(sorted({'torch', 'transformers', 'numpy', 'cuda'} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_transformers_that_is_too_old(tmp_path: Path) -> None:
    """By its metadata, so the error comes before anything of it is imported."""
    described = tmp_path / "transformers-4.55.4.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.55.4\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import spectralquant"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    text = 'DependencyError: transformers 4.55.4 is installed, spectralquant needs 4.56 or later: pip install --upgrade "transformers>=4.56"'
    assert out.returncode == 1 and text in out.stderr
    assert '"transformers>={}.{}"'.format(*TRANSFORMERS) in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_releases_of_transformers_are_told_apart_in_one_file() -> None:
    asks = re.compile(r"transformers[^\n]*\b__version__")
    found = {file.name for file in (ROOT / "spectralquant").rglob("*.py") if asks.search(file.read_text(encoding="utf-8"))}
    assert found == {"compat.py"}


def test_engine_and_backend_leave_cuda_alone() -> None:
    """What every user imports loads no cuda.core (torch itself loads the bindings where they are) and starts no CUDA context."""
    code = "import sys, torch, spectralquant.engine, spectralquant.backend; print('cuda.core' in sys.modules, torch.cuda.is_initialized())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_public_names_exist() -> None:
    for name in spectralquant.__all__:
        assert getattr(spectralquant, name) is not None


def test_package_data_is_there() -> None:
    root = files("spectralquant") / "data"
    assert len(list((root / "corpus").iterdir())) == 64 and len(list((root / "prompts").iterdir())) == 4


def test_wheel_holds_the_sources_of_kernels_and_of_the_page(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is written into the working tree."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "spectralquant", tmp_path / "spectralquant", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"spectralquant/evaluation/page/{file}" for file in ("page.css", "page.html.jinja")} <= set(names)
    packed = {name for name in names if name.endswith((".cu", ".cuh"))}
    kernels = ROOT / "spectralquant" / "kernels"
    sources = {f"spectralquant/kernels/{file.name}" for file in kernels.iterdir() if file.suffix in {".cu", ".cuh"}}
    assert packed == sources and "spectralquant/kernels/dense.cu" in packed
