"""`spectralquant doctor`: true on any machine, status 0 on all."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spectralquant import backend
from spectralquant.backend import KERNELS
from spectralquant.cli.main import main
from spectralquant.version import __version__


def findings(capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_doctor_tells_what_is_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibrations: Path) -> None:
    monkeypatch.setenv("SPECTRALQUANT_HOME", str(tmp_path))
    folder = tmp_path / "kernels"
    folder.mkdir(parents=True)
    (folder / "one.cubin").write_bytes(bytes(1000))
    calibrations.mkdir(parents=True)
    (calibrations / "one.safetensors").write_bytes(bytes(20))
    found = findings(capsys)
    assert found["versions"]["spectralquant"] == __version__ and found["versions"]["torch"] == torch.__version__
    assert found["kept"] == {"kernels": {"folder": str(folder), "bytes": 1000}, "calibrations": {"folder": str(calibrations), "bytes": 20}}
    assert len(found["devices"]) == torch.cuda.device_count()
    assert found["features"].keys() == KERNELS.keys() and all(f["reason"] for f in found["features"].values())


def test_doctor_without_a_gpu_and_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda.core", "cuda.bindings.nvrtc", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    found = findings(capsys)
    assert found["devices"] == [] and found["kernels"]["nvrtc"] is None and found["kernels"]["driver_cuda"] is None
    assert all(f["backend"] == "reference" for f in found["features"].values())
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "no CUDA device" in shown and "NVRTC not found" in shown and "decode attention: reference (" in shown


def test_doctor_with_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="a card", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "find_obstacle", lambda arch: None)
    found = findings(capsys)
    assert found["devices"] == [{"name": "a card", "compute_capability": "9.0", "memory_bytes": 80 * 2**30}]
    assert {feature: f["backend"] == "cuda" for feature, f in found["features"].items()} == KERNELS
    assert main(["doctor"]) == 0
    assert "cuda:0: a card, compute capability 9.0, 80.0 GiB" in capsys.readouterr().out
