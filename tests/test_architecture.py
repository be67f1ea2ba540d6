"""Promises about the package itself."""

import shutil
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import spectralquant

ROOT = Path(__file__).parents[1]


def test_import_is_lean() -> None:
    """`import spectralquant` loads neither torch nor transformers nor the CUDA packages."""
    code = "import sys, spectralquant; print(sorted({'torch', 'transformers', 'numpy', 'cuda'} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


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


def test_wheel_holds_the_sources_of_kernels(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is written into the working tree."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "spectralquant", tmp_path / "spectralquant", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".cu", ".cuh"))}
    kernels = ROOT / "spectralquant" / "kernels"
    sources = {f"spectralquant/kernels/{file.name}" for file in kernels.iterdir() if file.suffix in {".cu", ".cuh"}}
    assert packed == sources and "spectralquant/kernels/dense.cu" in packed
