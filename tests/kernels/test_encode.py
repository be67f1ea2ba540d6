"""encode_scalar.cu and encode_joint.cu against the PyTorch codec: on the host everywhere, on the device with a GPU.

Sums differ in order, so a code in a thousand may be its neighbour.
"""

import ctypes
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import synthetic
import torch
from host_kernels import compile_for_host
from torch import Tensor

from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.codec.encode_cuda import THREADS, EncodeLaunch, can_encode, joint_constants, plan_side
from spectralquant.codec.layout import UNIT, unpack_planes
from spectralquant.codec.units import encode_units
from spectralquant.config import Dials
from spectralquant.presets import PRESETS
from spectralquant.rope import Rotary

HOST = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
DIFFERENT = 2e-3
"""Share of tokens that may have another code: cells' borders within the rounding of a sum, and gains or paths that tie to the last bits."""
LAUNCHERS = {
    "encode_scalar": """
extern "C" void go(unsigned grid, void** p, long long* l) {
    run(encode_scalar, grid, 256u, (const float*)p[0], (const float*)p[1], (const float*)p[2], (const float*)p[3], (const i64*)p[4], (const u8*)p[5],
        (u8*)p[6], (u8*)p[7], (float*)p[8], l[0], l[1], l[2], l[3]);
}""",
    "encode_joint": """
extern "C" void go(unsigned grid, void** p, long long* l) {
    run(encode_joint, grid, 256u, (const float*)p[0], (const i64*)p[1], (const u8*)p[2], (const float*)p[3], (const float*)p[4], (const float*)p[5],
        (const float*)p[6], (const float*)p[7], (const float*)p[8], (u8*)p[9], (u8*)p[10], l[0], l[1], l[2], l[3]);
}
extern "C" unsigned shared_size() { return sizeof(Shared); }""",
}
CASES = {
    "64": {},
    "128, ultra": {"dim": 128, "preset": "ultra", "count": 256},
    "80": {"dim": 80, "count": 128},
    "96, standard": {"dim": 96, "preset": "standard", "count": 128},
    "scalar planes": {"quantizer": "uniform"},
    "least squares": {"key_gain": "ls", "value_gain": "ls"},
    "unbiased": {"key_gain": "unbiased"},
    "scalar, search": {"quantizer": "uniform", "value_gain": "search"},
    "some coordinates dropped": {"decay": 0.2},
}


@cache
def library(name: str, definitions: frozenset[tuple[str, int]]) -> ctypes.CDLL:
    return compile_for_host(f"{name}.cu", dict(definitions), LAUNCHERS[name], Path(mkdtemp()))


def run_on_host(launch: EncodeLaunch) -> None:
    code = library(launch.name, frozenset(launch.definitions.items()))
    pointers = [a.data_ptr() for a in launch.arguments if isinstance(a, Tensor)]
    numbers = [a for a in launch.arguments if not isinstance(a, Tensor)]
    code.go(launch.blocks, (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_longlong * len(numbers))(*numbers))
    if launch.name == "encode_joint":
        assert code.shared_size() == launch.shared_bytes


def make(dim: int = 64, preset: str = "high", quantizer: str = "joint", decay: float = 0.03, heads: int = 2, device: str = "cpu", **choices: str) -> LayerCodec:
    profile = synthetic.profile(heads, dim, (0,), decay, Rotary(synthetic.inv_freq(dim // 2)), **choices)
    return build_codec(profile, PRESETS[preset], Dials(), device, quantizer)[0]


def vectors(codec: LayerCodec, count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """u of K and of V, [B, H, T, D]: unit variance, some tokens much larger or smaller than others."""
    shape = (batch, codec.key.mean.shape[0], count, codec.head_dim)
    size = torch.randn(*shape[:3], 1).exp()
    device = codec.key.mean.device
    return tuple((torch.randn(shape) * size).to(device) for _ in range(2))


def store(codec: LayerCodec, batch: int, units: int, room: int = 3) -> Tensor:
    """Records of 0xaa with `room` units more than are written; the first stays untouched."""
    heads = codec.key.mean.shape[0]
    return torch.full((batch, heads, units + room, codec.layout.record_bytes), 0xAA, dtype=torch.uint8, device=codec.key.mean.device)


def same_share(got: Tensor, want: Tensor) -> float:
    return float((got == want).flatten(3).all(-1).float().mean()) if got.dim() == 4 else float((got == want).float().mean())


def check_side(codec: LayerCodec, u: Tensor, which: str, run) -> None:
    side, (batch, _, count, _) = getattr(codec, which), u.shape
    records = store(codec, batch, count // UNIT)
    part = 0 if which == "key" else 2
    view = codec.layout.split(records[:, :, 1 : 1 + count // UNIT])[part]
    launch = plan_side(side, u, view, which == "key", joint_constants(side))
    launch.gains.fill_(77)
    run(launch)
    centred = (u.double() @ torch.linalg.inv(side.encode_matrix.double())).float()
    planes, gains = side.encode(centred)
    got = unpack_planes(view, which).flatten(2, 3)
    assert same_share(got, planes) > 1 - DIFFERENT and same_share(launch.gains, gains) > 1 - DIFFERENT
    mine, theirs = (side.error(centred, p, g).double() for p, g in ((got, launch.gains), (planes, gains)))
    assert float((mine.sum() / theirs.sum()).log().abs()) < 1e-4  # where codes differ they are as good
    if launch.error is not None:
        torch.testing.assert_close(launch.error, mine.float(), rtol=2e-3, atol=1e-6 * float(mine.mean()))
    untouched = records.clone()
    codec.layout.split(untouched[:, :, 1 : 1 + count // UNIT])[part].fill_(0xAA)
    assert (untouched == 0xAA).all()


@HOST
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_encode_on_the_host(options: dict, poison: None) -> None:
    options = dict(options)
    count = options.pop("count", 256)
    codec = make(**options)
    assert can_encode(codec)
    for which, u in zip(("key", "value"), vectors(codec, count), strict=True):
        check_side(codec, u, which, run_on_host)


@HOST
def test_encode_of_zeros_and_huge_values(poison: None) -> None:
    """Gains end at the first and the last code, and nothing is NaN."""
    codec = make()
    for which, part in (("key", 0), ("value", 2)):
        side, u = getattr(codec, which), torch.zeros(1, 2, 128, 64)
        u[:, :, 5], u[:, :, 6] = 1e15, 1e-15
        launch = plan_side(side, u, codec.layout.split(store(codec, 1, 1)[:, :, :1])[part], which == "key", joint_constants(side))
        run_on_host(launch)
        assert torch.equal(launch.gains, side.encode((u.double() @ torch.linalg.inv(side.encode_matrix.double())).float())[1])
        assert (launch.gains[:, :, 5] == 255).all() and (launch.gains[:, :, 6] == 1).all() and (launch.error is None or launch.error.isfinite().all())


def test_can_encode_says_what_the_kernels_know() -> None:
    assert not can_encode(make(quantizer="lloyd-max"))
    assert not can_encode(make(value_gain="search"))


def test_encode_units_writes_what_the_codec_says() -> None:
    codec = make()
    keys, values = torch.randn(2, 2, 256, 64), torch.randn(2, 2, 256, 64)
    slots, start = torch.arange(128, 384), torch.tensor([0, 3])
    records = store(codec, 2, 2)
    gains, value_gains, error = encode_units(codec, keys, values, 128, start, records[:, :, 1:3], kernels=False)
    planes, want_gains, value_planes, want_value_gains = codec.encode(keys, values, slots, start)
    key, _, value, _ = codec.layout.split(records[:, :, 1:3])
    assert torch.equal(unpack_planes(key, "key").flatten(2, 3), planes) and torch.equal(unpack_planes(value, "value").flatten(2, 3), value_planes)
    assert torch.equal(gains, want_gains) and torch.equal(value_gains, want_value_gains)
    assert torch.equal(error, codec.key_error(keys, planes, gains, slots, start))
    assert (records[:, :, 0] == 0xAA).all() and (records[:, :, 3:] == 0xAA).all()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*CASES.values(), {"dim": 256, "count": 384}], ids=[*CASES, "256"])
def test_encode_on_the_device(options: dict) -> None:
    options = dict(options)
    count = options.pop("count", 256)
    codec = make(**options, device="cuda")
    for which, u in zip(("key", "value"), vectors(codec, 4 * count), strict=True):
        check_side(codec, u, which, lambda launch: launch.run(torch.device("cuda", 0)))


@pytest.mark.gpu
def test_encode_units_by_kernels() -> None:
    codec = make(device="cuda")
    keys, values = torch.randn(2, 2, 1024, 64, device="cuda"), torch.randn(2, 2, 1024, 64, device="cuda")
    start = torch.tensor([0, 3], device="cuda")
    stores = [store(codec, 2, 8) for _ in range(3)]
    got, want, again = (encode_units(codec, keys, values, 256, start, s[:, :, 1:9], k) for s, k in zip(stores, (True, False, True), strict=True))
    assert torch.equal(stores[0], stores[2]) and all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert all(same_share(a, b) > 1 - DIFFERENT for a, b in zip(got[:2], want[:2], strict=True))
    torch.testing.assert_close(got[2], want[2], rtol=2e-2, atol=1e-4)
    assert THREADS == 256
