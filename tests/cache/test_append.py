"""A token into the window: the kernel of append.cu, on the host everywhere and on the device with a GPU, against a loop."""

import ctypes
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from host_kernels import compile_for_host
from torch import Tensor

from spectralquant.cache.append_cuda import append_token, plan_append
from spectralquant.kernels.launch import Launch

LAUNCHER = """
extern "C" void append_token_(unsigned grid, unsigned block, void** p, long long* l) {
    run(append_token, grid, block, (const u16*)p[0], (const u16*)p[1], (u16*)p[2], (u16*)p[3], (int*)p[4], l[0], l[1], l[2], l[3], l[4], l[5]);
}
"""
SHAPES = pytest.mark.parametrize(("batch", "heads", "dim"), [(1, 2, 64), (3, 8, 128), (2, 1, 80), (5, 3, 256)])


@cache
def library(dim: int) -> ctypes.CDLL:
    return compile_for_host("append.cu", {"D": dim}, LAUNCHER, Path(mkdtemp()))


def run_on_host(launch: Launch, device: torch.device) -> None:
    pointers = [a.data_ptr() for a in launch.arguments if isinstance(a, Tensor)]
    numbers = [a for a in launch.arguments if isinstance(a, int)]
    code = library(launch.definitions["D"])
    code.append_token_(launch.blocks, launch.threads, (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_longlong * len(numbers))(*numbers))


def check(batch: int, heads: int, dim: int, device: str) -> None:
    """Tokens one after another from a partly filled window on, with the strides that attention layers hand over; nothing else changes."""
    capacity, recent = 9, 5
    windows = [torch.randn(batch, heads, capacity, dim, device=device).bfloat16() for _ in range(2)]
    want, lengths = [w.clone() for w in windows], torch.tensor([[3, recent]] * batch, dtype=torch.int32, device=device)
    for i in range(recent, capacity):
        keys, values = torch.randn(2, batch, 1, heads, dim + 8, device=device).bfloat16()[..., :dim].transpose(2, 3)
        append_token(keys, values, *windows, lengths)
        want[0][:, :, i], want[1][:, :, i] = keys[:, :, 0], values[:, :, 0]
        assert lengths.tolist() == [[3, i + 1]] * batch
        assert all(torch.equal(a, b) for a, b in zip(windows, want, strict=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@SHAPES
def test_append_on_the_host(batch: int, heads: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "run", run_on_host)
    check(batch, heads, dim, "cpu")


@pytest.mark.gpu
@SHAPES
def test_append_on_the_device(batch: int, heads: int, dim: int) -> None:
    check(batch, heads, dim, "cuda")


def test_the_plan_takes_keys_in_any_layout() -> None:
    keys = torch.randn(2, 3, 64, 1).mT  # the last dimension is not contiguous
    launch = plan_append(keys, keys, torch.zeros(2, 3, 4, 64), torch.zeros(2, 3, 4, 64), torch.zeros((2, 2), dtype=torch.int32))
    assert isinstance(launch.arguments[0], Tensor) and launch.arguments[0].stride(-1) == 1
