"""dense.cu against the layout's reference: on the host everywhere, on the device with a GPU."""

import shutil
from ctypes import c_longlong, c_uint, c_void_p
from pathlib import Path

import pytest
import torch
from host_kernels import compile_for_host
from torch import Tensor

from spectralquant.codec.decode_cuda import UnpackLaunch
from spectralquant.codec.layout import RecordLayout, gain_values, unpack_gains, unpack_planes
from spectralquant.codec.units import unpack_units
from spectralquant.kernels.compiler import compile_cubin, load
from spectralquant.kernels.sources import SOURCES

ROWS, UNITS, ALLOCATED = 3, 2, 5
BLOCK = 224
"""Threads of a block: divides no number of threads that is needed, so the last block has some too many."""

LAUNCHERS = """
extern "C" void planes(unsigned grid, unsigned block, const unsigned char* records, unsigned char* out, long long rows, long long units, long long stride) {
    run(decode_planes, grid, block, records, out, rows, units, stride);
}
extern "C" void gains(unsigned grid, unsigned block, const unsigned char* records, float* out, long long rows, long long units, long long stride) {
    run(decode_gains, grid, block, records, out, rows, units, stride);
}
"""
WIDTHS = pytest.mark.parametrize(("key", "value"), [(16, 48), (144, 160)])
SIDES = pytest.mark.parametrize("is_key", [1, 0], ids=["key", "value"])


def random_records(layout: RecordLayout, device: torch.device) -> Tensor:
    """[ROWS, UNITS, record bytes]: the first units of a store with room for more; every gain code is there, 0 included."""
    return torch.randint(0, 256, (ROWS, ALLOCATED, layout.record_bytes), dtype=torch.uint8, device=device)[:, :UNITS]


def expected(records: Tensor, layout: RecordLayout, is_key: int) -> tuple[Tensor, Tensor]:
    """(planes [ROWS, UNITS * 128, P], gains [ROWS, UNITS * 128]) by the reference."""
    key, key_gains, value, value_gains = layout.split(records)
    planes = unpack_planes(key, "key") if is_key else unpack_planes(value, "value")
    return planes.flatten(1, 2), gain_values(unpack_gains(key_gains if is_key else value_gains)).flatten(1, 2)


def padded(like: Tensor) -> Tensor:
    """Room for `like`, flat, and 64 elements more that nobody may write."""
    return torch.full((like.numel() + 64,), 77, dtype=like.dtype, device=like.device)


def grid_for(threads: int) -> int:
    return -(-threads // BLOCK)


def check(planes: Tensor, gains: Tensor, want_planes: Tensor, want_gains: Tensor) -> None:
    assert torch.equal(planes[:-64], want_planes.flatten()) and (planes[-64:] == 77).all()
    torch.testing.assert_close(gains[:-64], want_gains.flatten(), rtol=1e-6, atol=0)  # exp2 of two libraries: the last bits of a float32
    assert (gains[-64:] == 77).all() and ((gains[:-64] == 0) == (want_gains.flatten() == 0)).all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@WIDTHS
@SIDES
def test_dense_on_the_host(key: int, value: int, is_key: int, tmp_path: Path) -> None:
    layout = RecordLayout(key, value)
    records = random_records(layout, torch.device("cpu"))
    want_planes, want_gains = expected(records, layout, is_key)
    planes, gains = padded(want_planes), padded(want_gains)
    library = compile_for_host("dense.cu", {"KEY_PLANES": key, "VALUE_PLANES": value, "IS_KEY": is_key}, LAUNCHERS, tmp_path)
    sizes = (c_longlong(ROWS), c_longlong(UNITS), c_longlong(records.stride(0)))
    for function, out, threads in ((library.planes, planes, want_planes.numel() // 64), (library.gains, gains, want_gains.numel())):
        function(c_uint(grid_for(threads)), c_uint(BLOCK), c_void_p(records.data_ptr()), c_void_p(out.data_ptr()), *sizes)
    check(planes, gains, want_planes, want_gains)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("which", ["key", "value"])
def test_unpack_units_by_kernels_is_the_reference(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched, run on the host: units in the middle of a store, several sequences and heads."""
    layout = RecordLayout(80, 96)
    store = torch.randint(0, 256, (2, 3, 6, layout.record_bytes), dtype=torch.uint8)

    def run(launch: UnpackLaunch) -> None:
        library = compile_for_host("dense.cu", launch.definitions, LAUNCHERS, tmp_path)
        for (_, out, threads, sizes), function in zip(launch.parts(), (library.planes, library.gains), strict=True):
            pointers = (c_void_p(launch.records.data_ptr()), c_void_p(out.data_ptr()))
            function(c_uint(grid_for(threads)), c_uint(BLOCK), *pointers, *map(c_longlong, sizes))

    monkeypatch.setattr(UnpackLaunch, "run", run)
    records = store[:, :, 1:4]
    got, want = (unpack_units(layout, records, which, kernels) for kernels in (True, False))
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_unpack_units_on_the_device() -> None:
    layout = RecordLayout(80, 96)
    records = torch.randint(0, 256, (2, 3, 6, layout.record_bytes), dtype=torch.uint8, device="cuda")[:, :, 1:4]
    for which in ("key", "value"):
        got, want = (unpack_units(layout, records, which, kernels) for kernels in (True, False))
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=0)


@pytest.mark.gpu
@WIDTHS
@SIDES
def test_dense_on_the_device(key: int, value: int, is_key: int) -> None:
    layout, device = RecordLayout(key, value), torch.device("cuda", 0)
    records = random_records(layout, device)
    want_planes, want_gains = expected(records, layout, is_key)
    planes, gains = padded(want_planes), padded(want_gains)
    definitions = {"KEY_PLANES": key, "VALUE_PLANES": value, "IS_KEY": is_key}
    for name, out, threads in (("decode_planes", planes, want_planes.numel() // 64), ("decode_gains", gains, want_gains.numel())):
        load("dense.cu", definitions, name, device)(grid_for(threads), BLOCK, 0, (records.data_ptr(), out.data_ptr(), ROWS, UNITS, records.stride(0)))
    check(planes, gains, want_planes, want_gains)


def test_record_offsets_of_the_worked_example(tmp_path: Path) -> None:
    """docs/format.md, section 1: the offsets in unpack.cuh are those of the page."""
    pytest.importorskip("cuda.core", reason="needs the extra cuda", exc_type=ImportError)
    (tmp_path / "check.cu").write_text(
        '#include "unpack.cuh"\n'
        "using R = RecordLayout<144, 160>;\n"
        "static_assert(R::KEY_GAINS == 4608 && R::VALUE_CODES == 4736 && R::VALUE_GAINS == 9856 && R::BYTES == 9984);\n"
        "static_assert(UNIT == 128 && SUB_TILES * 16 == UNIT);\n"
    )
    for name in ("unpack.cuh", "ptx.cuh", "types.cuh"):
        shutil.copy(SOURCES / name, tmp_path)
    compile_cubin("check.cu", {}, "sm_90", tmp_path)
