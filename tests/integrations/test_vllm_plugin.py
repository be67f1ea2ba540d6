"""What the plugin says before there is a vLLM: options and releases."""

from importlib.metadata import PackageNotFoundError

import pytest

from spectralquant.errors import ConfigError, DependencyError
from spectralquant.integrations.vllm import plugin
from spectralquant.integrations.vllm.options import Options, read_options


@pytest.mark.parametrize("release", ["0.29.0", "0.30.2", "0.32.0", "0.33.0rc1", "0.33.4"])
def test_releases_within_the_window(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "version", lambda name: release)
    plugin.require_vllm()


@pytest.mark.parametrize("release", ["0.28.1", "0.8.5", "0.34.0", "1.0.0"])
def test_releases_outside_of_it_are_refused(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "version", lambda name: release)
    with pytest.raises(DependencyError, match=rf"vLLM {release} is installed.* works with 0\.29 to 0\.33.*serve without"):
        plugin.require_vllm()


def test_the_cpu_package_counts_as_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "vllm":
            raise PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(plugin, "version", version)
    assert plugin.installed_version() == "0.32.0"


def test_options() -> None:
    assert read_options({}) is None and read_options({"other": {}}) is None
    assert read_options({"spectralquant": {}}) == Options()
    read = read_options({"spectralquant": {"preset": "max", "calibration": "F", "sinks": 2, "recent_pages": 40}})
    assert read == Options("max", "F", sinks=2, recent_pages=40)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"prest": "high"}, r"'prest'.*expected preset, calibration"),
        ({"preset": "highest"}, "'highest' is no preset"),
        ({"exact_per_page": 0}, "exact_per_page=0 is out of range"),
        ({"sinks": 9}, "sinks=9 is out of range"),
        ({"recent_pages": 1}, "recent_pages=1 is out of range"),
        ({"calibration": 3}, "calibration=3"),
        ("high", 'expected an object such as {"preset": "high"}'),
    ],
)
def test_wrong_options_are_named(said: object, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_options({"spectralquant": said})
