"""CUDA sources run on the host, every thread a fiber: checks indices, bits and fragments without a GPU (see host_device.hpp)."""

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from spectralquant.kernels.sources import SOURCES, read_source

_HERE = Path(__file__).parent


def compile_for_host(source: str, definitions: Mapping[str, int], launchers: str, folder: Path) -> ctypes.CDLL:
    """A library of `source`; `launchers` is C++ after it, with extern "C" functions that call `run(kernel, grid, block, args...)`."""
    for file in SOURCES.glob("*.cu*"):
        shutil.copy(file, folder)
    shutil.copy(_HERE / "host_ptx.cuh", folder / "ptx.cuh")
    text = folder / "host.cpp"
    text.write_text(f'#include "{_HERE / "host_device.hpp"}"\n' + read_source(source, folder) + launchers)
    library = folder / "host.so"
    macros = [f"-D{name}={value}" for name, value in definitions.items()]
    subprocess.run(["g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", *macros, str(text), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
