"""The attention kernels run on the host (see host_kernels.py), as a launch says."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from host_kernels import compile_for_host
from torch import Tensor

from spectralquant.attention.cuda import THREADS, Launch
from spectralquant.kernels import launch as plain

_ANY_POINTER = """
struct Pointer { void* p; template <class T> operator T*() const { return (T*)p; } };
extern "C" void go(unsigned grid, void** p, long long* l, int* n, float* f) { run(KERNEL, grid, THREADS_OF, ARGUMENTS); }
"""
_SHARED_SIZE = 'extern "C" unsigned shared_size() { return sizeof(Shared); }\n'
_KINDS: dict[type, tuple[str, Any]] = {
    Tensor: ("Pointer{{p[{}]}}", ctypes.c_void_p),
    int: ("l[{}]", ctypes.c_longlong),
    np.int32: ("n[{}]", ctypes.c_int),
    np.float32: ("f[{}]", ctypes.c_float),
    type(None): ("Pointer{{nullptr}}", ctypes.c_void_p),
}


def run_on_host(launch: Launch) -> Tensor:
    """What `FusedAttention.run` gives; the output is NaN before."""
    launch.out.fill_(torch.nan)
    attend_on_host(launch)
    return launch.out.transpose(1, 2)


def attend_on_host(launch: Launch) -> None:
    """Into `launch.out`."""
    kinds = tuple(map(type, launch.arguments))
    partials = launch.arguments[kinds.index(int) - 2]
    partials.fill_(torch.nan)  # whatever was in memory
    code = _library("attend.cu", "attend", frozenset(launch.definitions.items()), THREADS, kinds)
    assert code.shared_size() <= launch.shared_bytes
    _go(code, launch.blocks, launch.arguments)


def launch_on_host(launch: plain.Launch) -> None:
    """Any other kernel."""
    kinds = tuple(map(type, launch.arguments))
    _go(_library(launch.source, launch.kernel, frozenset(launch.definitions.items()), launch.threads, kinds), launch.blocks, launch.arguments)


@cache
def _library(source: str, kernel: str, definitions: frozenset[tuple[str, int]], threads: int, kinds: tuple[type, ...]) -> ctypes.CDLL:
    arguments = ", ".join(_KINDS[kind][0].format(kinds[:i].count(kind)) for i, kind in enumerate(kinds))
    text = _ANY_POINTER.replace("KERNEL", kernel).replace("THREADS_OF", str(threads)).replace("ARGUMENTS", arguments)
    return compile_for_host(source, dict(definitions), text + _SHARED_SIZE * (source == "attend.cu"), Path(mkdtemp()))


def _go(code: ctypes.CDLL, blocks: int, arguments: Sequence[Any]) -> None:
    packed: list[Any] = []
    for kind, (_, of) in list(_KINDS.items())[:4]:
        found = [a.data_ptr() if kind is Tensor else kind(a) if kind is int else kind(a).item() for a in arguments if type(a) is kind]
        packed.append((of * len(found))(*found))
    code.go(blocks, *packed)
