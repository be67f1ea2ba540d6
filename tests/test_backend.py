"""Which backend is taken, and what is said about it."""

import logging

import pytest
import torch

from spectralquant import backend
from spectralquant.backend import BACKENDS, KERNELS, BackendChoice, choose_for_feature, resolve_backend
from spectralquant.errors import BackendError, ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A machine with one GPU; what a test puts into the dict holds from then on."""
    facts: dict[str, object] = {"available": True, "capability": (9, 0), "name": "a card", "obstacle": None}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: facts["available"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: facts["name"])
    monkeypatch.setattr(backend, "find_obstacle", lambda arch: facts["obstacle"])
    return facts


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_resolve_backend_takes_kernels_where_they_can_run(asked: backend.Backend) -> None:
    assert resolve_backend(asked, GPU) == BackendChoice("cuda", "cuda:0 can run the kernels")


@pytest.mark.usefixtures("card")
def test_resolve_backend_takes_the_reference_when_asked() -> None:
    assert resolve_backend("reference", GPU) == BackendChoice("reference", "asked for")


@pytest.mark.parametrize(
    ("fact", "value", "text"),
    [
        ("available", False, "PyTorch finds no usable NVIDIA GPU"),
        ("capability", (7, 5), r"a card has compute capability 7\.5; the kernels need 8\.0 or newer"),
        ("obstacle", "no package xyz; install it", "no package xyz; install it"),
    ],
)
def test_resolve_backend_says_what_is_in_the_way(fact: str, value: object, text: str, card: dict[str, object]) -> None:
    card[fact] = value
    with pytest.raises(BackendError, match=f"backend='cuda' can't be used: {text}"):
        resolve_backend("cuda", GPU)
    choice = resolve_backend("auto", GPU)
    assert choice.name == "reference" and text.replace("\\", "") in choice.reason


def test_resolve_backend_rejects_a_pytorch_without_cuda(card: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm calls its devices "cuda" too."""
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match="built without CUDA"):
        resolve_backend("cuda", GPU)


def test_resolve_backend_rejects_cuda_for_a_cpu() -> None:
    with pytest.raises(BackendError, match=r"on device 'cpu'.*backend='auto' would take the reference"):
        resolve_backend("cuda", CPU)


def test_resolve_backend_rejects_unknown_names() -> None:
    with pytest.raises(ConfigError, match=f"backend='triton': expected one of {', '.join(BACKENDS)}"):
        resolve_backend("triton", CPU)  # pyright: ignore


def test_resolve_backend_warns_once_on_a_gpu(card: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    card["obstacle"] = "a reason that only this test gives"
    for _ in range(3):
        resolve_backend("auto", GPU)
    assert [(r.levelno, r.message) for r in caplog.records] == [(logging.WARNING, f"the PyTorch reference is used: {card['obstacle']}")]


def test_resolve_backend_is_quiet_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    """The default level of logging is WARNING; a CPU is no cause for one."""
    assert resolve_backend("auto", CPU).name == "reference"
    assert all(r.levelno < logging.WARNING for r in caplog.records)


def test_choose_for_feature_needs_a_kernel() -> None:
    cuda, reference = BackendChoice("cuda", "it can"), BackendChoice("reference", "asked for")
    for feature, has_kernel in KERNELS.items():
        assert choose_for_feature(feature, reference) == reference
        assert (choose_for_feature(feature, cuda) == cuda) == has_kernel


@pytest.mark.gpu
def test_resolve_backend_on_this_gpu() -> None:
    """Where the GPU tests run, the kernels can."""
    assert resolve_backend("cuda", GPU).name == "cuda"
