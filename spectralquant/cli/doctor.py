"""`spectralquant doctor`: what is installed, which devices there are, and what runs on CUDA kernels here."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spectralquant.cli.options import Json
from spectralquant.home import folder_bytes
from spectralquant.version import __version__


def doctor(as_json: Json = False) -> None:
    """Show versions, devices, kept files, and what runs on CUDA kernels here.

    \b
    spectralquant doctor
    spectralquant doctor --json
    """
    from spectralquant.cli.output import Output

    out, findings = Output(as_json), examine()
    out.say(_describe(findings))
    out.document(findings)


def examine() -> dict[str, Any]:
    """{versions, devices, kernels, kept, features}, ready for JSON. Sizes in bytes; None where something is missing."""
    import torch

    from spectralquant.backend import KERNELS, choose_for_feature, resolve_backend
    from spectralquant.calibration_cache import calibrations_folder
    from spectralquant.kernels.compiler import find_toolchain
    from spectralquant.kernels.disk_cache import cache_folder

    toolchain = find_toolchain()
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    choice = resolve_backend("auto", device)
    features = {feature: choose_for_feature(feature, choice) for feature in KERNELS}
    return {
        "versions": {
            "spectralquant": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": _version("transformers"),
        },
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "kernels": {"cuda_core": toolchain.cuda_core, "nvrtc": _dotted(toolchain.nvrtc), "driver_cuda": _dotted(toolchain.driver)},
        "kept": {"kernels": _folder(cache_folder()), "calibrations": _folder(calibrations_folder())},
        "features": {feature: {"backend": chosen.name, "reason": chosen.reason} for feature, chosen in features.items()},
    }


def _folder(folder: Path | None) -> dict[str, Any]:
    return {"folder": None if folder is None else str(folder), "bytes": folder_bytes(folder)}


def _device(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": _dotted((properties.major, properties.minor)),
        "memory_bytes": properties.total_memory,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _dotted(numbers: tuple[int, int] | None) -> str | None:
    return None if numbers is None else f"{numbers[0]}.{numbers[1]}"


def _describe(findings: dict[str, Any]) -> str:
    devices = [
        f"cuda:{i}: {d['name']}, compute capability {d['compute_capability']}, {d['memory_bytes'] / 2**30:.1f} GiB" for i, d in enumerate(findings["devices"])
    ]
    kernels = findings["kernels"]
    tools = [("cuda-core", kernels["cuda_core"]), ("NVRTC", kernels["nvrtc"]), ("CUDA of the driver", kernels["driver_cuda"])]
    sections = {
        "versions": [f"{name} {number or 'is not installed'}" for name, number in findings["versions"].items()],
        "devices": devices or ["no CUDA device; tensors are on the CPU"],
        "kernels": [f"{name} {number or 'not found'}" for name, number in tools],
        "kept on this machine": [
            f"{kind}: {it['folder']}, {it['bytes'] / 2**20:.1f} MiB" if it["folder"] else f"{kind}: nowhere, there is no home folder"
            for kind, it in findings["kept"].items()
        ],
        "what runs": [f"{feature}: {chosen['backend']} ({chosen['reason']})" for feature, chosen in findings["features"].items()],
    }
    return "\n".join(line for title, lines in sections.items() for line in (title, *(f"  {line}" for line in lines)))
