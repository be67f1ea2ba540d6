"""Promises about the package itself."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

import spectralquant
from spectralquant.requirements import TRANSFORMERS

ROOT = Path(__file__).parents[1]


HEAVY = {"torch", "transformers", "numpy", "cuda", "safetensors", "tqdm"}


def test_import_is_lean() -> None:
    """`import spectralquant` loads nothing that it was not asked for."""
    code = f"import sys, spectralquant; print(sorted({HEAVY | {'typer', 'rich', 'filelock'}!r} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["presets"], ["evaluate", "--help"]])
def test_command_line_answers_without_torch(arguments: list[str]) -> None:
    code = f"import sys\ntry: main({arguments!r})\nexcept SystemExit: pass\nprint(sorted({HEAVY!r} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", f"from spectralquant.cli.main import main; {code}"], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


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


def test_wheel_holds_everything_of_the_package(tmp_path: Path) -> None:
    """Kernels, corpus, prompts, templates and py.typed too; and of the rest nothing."""
    with zipfile.ZipFile(built("wheel", tmp_path)) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == {name for name in tracked() if name.startswith("spectralquant/")}
    assert {"spectralquant/kernels/dense.cu", "spectralquant/evaluation/page/page.html.jinja", "spectralquant/py.typed"} <= packed


def test_sdist_holds_all_that_is_tracked(tmp_path: Path) -> None:
    """Its tests run: they read pages, examples, scripts and figures."""
    with tarfile.open(built("sdist", tmp_path)) as sdist:
        packed = {file.name.split("/", 1)[1] for file in sdist.getmembers() if file.isfile()}
    assert tracked() - packed == {".gitignore"}
    assert {name for name in packed - tracked() if ".egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}


def tracked() -> set[str]:
    """Files of the repository that are there, and new ones that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).exists()}


def built(kind: str, folder: Path) -> Path:
    """The wheel or sdist of a copy of what is tracked, so that nothing is written into the working tree."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    code = f"from setuptools.build_meta import build_{kind}; build_{kind}('dist')"
    out = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert not re.search("no .*files found|no directories found|Deprecat", out.stdout + out.stderr)
    (file,) = (folder / "dist").iterdir()
    return file
