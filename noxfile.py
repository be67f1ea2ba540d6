"""`nox`: what a cache promises, tested on releases of transformers from the oldest to the newest, and of vLLM, each in its own virtual environment; and
whether packages that are installed have known vulnerabilities.

One of transformers holds transformers and what that release pins; what it lacks (torch, pytest) it finds in the environment that nox was started from, so
making it takes seconds. Where nox has an environment to itself, everything is installed.
"""

import json
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import nox

RELEASES = ["4.56.2", "4.57.6", "5.0.0", "5.17.0", "newest"]
SERVERS = ["0.29.0", "0.31.0", "0.32.0"]
"""Releases of vLLM that come as a package for CPUs, from the oldest that the plugin takes."""
CONTRACT = [
    "tests/cache/test_file.py", "tests/cache/test_hf.py", "tests/attention/test_hf.py", "tests/attention/test_dispatch.py", "tests/generation",
    "tests/integrations", "tests/test_families.py",
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


@nox.session(venv_backend="none")
def audit(session: nox.Session) -> None:
    """Look up the packages beside nox among known vulnerabilities. Where the service can't be reached the session is skipped, and says so.

    pip-audit alone is green there: an index that has no advisories answers as if there were none of the packages, and they are passed over.
    """
    if find_spec("pip_audit") is None:
        session.error('pip-audit is not installed; run: pip install -e ".[dev]"')
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    ended = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(ended.stdout)["dependencies"]
    except ValueError:
        session.skip(f"NOT AUDITED, pip-audit gave no answer: {' '.join(ended.stderr.split())[-200:]}")
    looked_up = [package for package in packages if "vulns" in package]
    if not looked_up:
        session.skip(f"NOT AUDITED, the index answers for none of {len(packages)} packages; run it where https://pypi.org can be reached")
    session.log(f"{len(looked_up)} packages looked up; not looked up: {', '.join(p['name'] for p in packages if 'vulns' not in p) or 'none'}")
    for package in (package for package in looked_up if package["vulns"]):
        session.warn(f"{package['name']} {package['version']}: {', '.join(v['id'] for v in package['vulns'])}")
    if any(package["vulns"] for package in looked_up):
        session.error("packages with known vulnerabilities, see above")


def share_packages(session: nox.Session) -> None:
    """Let the session's environment look behind its own packages into those beside nox."""
    own = session.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True)
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(str(own).strip()) / "shared.pth").write_text(line, encoding="utf-8")
