"""dense.cu against the codec's reference: on the host everywhere, on the device with a GPU."""

import ctypes
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import synthetic
import torch
from host_kernels import compile_for_host
from torch import Tensor

from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.codec.decode_cuda import plan_decode
from spectralquant.codec.layout import UNIT
from spectralquant.codec.units import decode_units
from spectralquant.config import Dials
from spectralquant.kernels.compiler import compile_cubin
from spectralquant.kernels.launch import Launch
from spectralquant.kernels.sources import SOURCES
from spectralquant.presets import PRESETS
from spectralquant.rope import Rotary

BLOCK = 96
"""Threads of a block on the host: divides no number of threads that is needed, so the last block has some too many."""
ERROR = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative RMS: W in two float16 numbers is as precise as float32; half an ulp of the 16-bit outputs is less than this."""
LAUNCHER = """
extern "C" void go(unsigned grid, unsigned block, void** p, long long* n) {
    run(decode_units, grid, block, (const u8*)p[0], (const float*)p[1], (const float*)p[2], (const float*)p[3], (const float*)p[4], (const float*)p[5],
        (const int*)p[6], (Out*)p[7], n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]);
}
"""
SIDES = pytest.mark.parametrize("which", ["key", "value"])
CODECS: dict[str, dict[str, Any]] = {
    "neox": {},
    "interleaved": {"rotary": "gptj"},
    "partial rotary": {"rotary": "partial"},
    "partial rotary, head size 80": {"rotary": "partial", "dim": 80},
    "no rotary": {"rotary": None},
    "plain frame": {"run": 0},
    "constant mean": {"trajectory": False},
    "one unit a run": {"run": 128},
    "head size 256, standard": {"dim": 256, "heads": 1, "preset": "standard"},
    "joint values, ultra, head size 128": {"quantizer": "joint", "preset": "ultra", "dim": 128},
}


def make_codec(
    dim: int = 64, heads: int = 2, rotary: str | None = "neox", preset: str = "high", quantizer: str = "uniform", device: str = "cpu", **choices: Any
) -> LayerCodec:
    turn = None if rotary is None else Rotary(synthetic.inv_freq(dim // 8 if rotary == "partial" else dim // 2), rotary == "gptj")
    return build_codec(synthetic.profile(heads, dim, (0,), rotary=turn, **choices), PRESETS[preset], Dials(), device, quantizer)[0]


def random_units(codec: LayerCodec, device: str = "cpu", batch: int = 2, units: int = 2) -> Tensor:
    """Units 1 .. of a store with room for more; gains around 1, some slots don't count."""
    heads = len(codec.key.mean)
    store = torch.randint(0, 256, (batch, heads, units + 2, codec.layout.record_bytes), dtype=torch.uint8, device=device)
    for gains in codec.layout.split(store)[1::2]:
        gains.copy_(torch.where(gains < 20, 0, 100 + gains % 50))
    return store[:, :, 1 : units + 1]


@cache
def library(definitions: frozenset[tuple[str, int]]) -> ctypes.CDLL:
    return compile_for_host("dense.cu", dict(definitions), LAUNCHER, Path(mkdtemp()))


def run_on_host(launch: Launch, device: torch.device | None = None) -> None:
    pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in launch.arguments[:8]]
    go = library(frozenset(launch.definitions.items())).go
    go(-(-launch.blocks * launch.threads // BLOCK), BLOCK, (ctypes.c_void_p * 8)(*pointers), (ctypes.c_longlong * 8)(*launch.arguments[8:]))


def check(codec: LayerCodec, which: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """As the reference decodes, and nothing beside it: every third slot is left out, the others stand in reverse order between rows of something else."""
    records, start = random_units(codec, device), torch.tensor([0, 37], device=device)
    tokens, heads, dim = records.shape[2] * UNIT, len(codec.key.mean), codec.head_dim
    rows = torch.where(torch.arange(tokens) % 3 > 0, tokens - torch.arange(tokens), -1).int().to(device).repeat(2, 1)
    got, want = (torch.full((2, heads, tokens + 2, dim), 77.0, dtype=kind, device=device) for kind in (dtype, torch.float32))
    for out, kernels in ((got, True), (want, False)):
        decode_units(codec, records, which, UNIT, start, out.transpose(1, 2), rows, kernels)
    written = (want != 77).any(-1)
    assert (got[~written] == 77).all() and int(written.sum()) == heads * int((rows >= 0).sum())
    assert (got.float() - want)[written].norm() / want[written].norm() < ERROR[dtype]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@SIDES
@pytest.mark.parametrize("options", CODECS.values(), ids=CODECS)
def test_decode_units_on_the_host(options: dict[str, Any], which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "run", run_on_host)
    check(make_codec(**options), which, torch.float32)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_units_in_16_bits_on_the_host(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "run", run_on_host)
    for which in ("key", "value"):
        check(make_codec(heads=1), which, dtype)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_decode_units_of_any_scale_on_the_host(size: float) -> None:
    """Far beyond float16, which the kernel multiplies in. Rows are tokens where none are given."""
    codec = make_codec(heads=1)
    codec.key.decode_matrix.mul_(size)
    codec.key.mean.mul_(size)
    records, start = random_units(codec, batch=1), torch.zeros(1, dtype=torch.int64)
    got, want = torch.empty(2, 1, records.shape[2] * UNIT, 1, codec.head_dim)
    run_on_host(plan_decode(codec, records, "key", UNIT, start, got, None))
    decode_units(codec, records, "key", UNIT, start, want)
    assert (got - want).norm() / want.norm() < ERROR[torch.float32]


@pytest.mark.gpu
@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", CODECS.values(), ids=CODECS)
def test_decode_units_on_the_device(options: dict[str, Any], dtype: torch.dtype, which: str) -> None:
    check(make_codec(**options, device="cuda"), which, dtype, "cuda")


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
