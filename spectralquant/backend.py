"""Reference or CUDA: chosen once per device, with the reason in words.

The reference is PyTorch on any device; CUDA kernels need an NVIDIA GPU of compute capability 8.0 and the extra `spectralquant[cuda]`.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from spectralquant.config import BACKENDS, Backend
from spectralquant.errors import BackendError, ConfigError
from spectralquant.kernels.compiler import arch_of, find_obstacle

MIN_CAPABILITY = (8, 0)
"""Of the kernels: 16-byte asynchronous copies and mma.m16n8k16 came with it."""

KERNELS: dict[str, bool] = {"decode attention": True, "encoding": True, "dense decode": True}
"""Feature -> whether it runs on a CUDA kernel where the backend is "cuda"; the others run on the reference everywhere."""

_log = logging.getLogger("spectralquant")


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """What runs, "reference" or "cuda", and why."""

    name: Literal["reference", "cuda"]
    reason: str


def resolve_backend(backend: Backend, device: torch.device) -> BackendChoice:
    """The backend for tensors on `device`. "auto" takes the kernels where they can run and tells the log, once, why they can't.

    Raises:
        BackendError: "cuda" can't be used; the text says why and what would help.
        ConfigError: `backend` is none of BACKENDS.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return BackendChoice("reference", "asked for")
    obstacle = _find_obstacle(device)
    if obstacle is None:
        return BackendChoice("cuda", f"{device} can run the kernels")
    if backend == "cuda":
        raise BackendError(f"backend='cuda' can't be used: {obstacle}; backend='auto' would take the reference")
    # On a CPU nobody expects kernels; on a GPU their absence is worth a warning.
    _log_once(logging.WARNING if device.type == "cuda" else logging.INFO, f"the PyTorch reference is used: {obstacle}")
    return BackendChoice("reference", obstacle)


def choose_for_feature(feature: str, choice: BackendChoice) -> BackendChoice:
    """What runs for one of KERNELS where `choice` is the backend."""
    if choice.name == "cuda" and not KERNELS[feature]:
        return BackendChoice("reference", "this release has no CUDA kernel for it")
    return choice


def _find_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on device {str(device)!r}, not on an NVIDIA GPU"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA; install a CUDA build"
    if not torch.cuda.is_available():
        return "PyTorch finds no usable NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; the kernels need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer"
    return find_obstacle(arch_of(device))


@cache
def _log_once(level: int, message: str) -> None:
    _log.log(level, message)
