"""CUDA sources run on the host, thread after thread: checks indices, offsets and bits without a GPU.

Good for kernels whose threads do not talk to each other. Inline PTX (`ptx.cuh`) is replaced by plain C++.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from spectralquant.kernels.sources import SOURCES, read_source

_PTX = "inline float exp2_approx(float x) { return exp2f(x); }\n"
_PROLOGUE = """
#include <cmath>
#define __device__
#define __global__
#define __forceinline__ inline
struct uint4 { unsigned x, y, z, w; };
static struct { unsigned x; } blockIdx, blockDim, threadIdx;
"""
_EPILOGUE = """
template <class... P>
static void run(void (*kernel)(P...), unsigned grid, unsigned block, P... args) {
    blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) kernel(args...);
}
"""


def compile_for_host(source: str, definitions: Mapping[str, int], launchers: str, folder: Path) -> ctypes.CDLL:
    """A library of `source`; `launchers` is C++ after it, with extern "C" functions that call `run(kernel, grid, block, args...)`."""
    for file in SOURCES.glob("*.cu*"):
        shutil.copy(file, folder)
    (folder / "ptx.cuh").write_text(_PTX)
    text = folder / "host.cpp"
    text.write_text(_PROLOGUE + read_source(source, folder) + _EPILOGUE + launchers)
    library = folder / "host.so"
    macros = [f"-D{name}={value}" for name, value in definitions.items()]
    subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *macros, str(text), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
