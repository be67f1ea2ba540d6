"""whiten.cu, encode_scalar.cu and encode_joint.cu against the PyTorch codec: on the host everywhere, on the device with a GPU.

Sums differ in order, so a code in a thousand may be its neighbour.
"""

import ctypes
import shutil
from collections.abc import Callable
from dataclasses import astuple
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
from spectralquant.codec.encode_cuda import Encoding, can_encode, joint_tables, plan_joint, plan_scalar, plan_whitening
from spectralquant.codec.joint import JointPlanes
from spectralquant.codec.layout import UNIT, unpack_planes
from spectralquant.codec.units import encode_units
from spectralquant.config import Dials
from spectralquant.kernels.launch import Launch
from spectralquant.presets import PRESETS
from spectralquant.rope import Rotary

HOST = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
DIFFERENT = 2.5e-5
"""Share of tokens that may have another code, for each of their coordinates: cells' borders within the rounding of a sum, and gains or paths that tie to the
last bits."""
LAUNCHERS = {
    "whiten": """
extern "C" void go(unsigned grid, unsigned block, void** p, long long* l) {
    run(whiten, grid, block, (const Element*)p[0], (const float*)p[1], (const float*)p[2], (const double*)p[3], (const float*)p[4], (const i64*)p[5],
        (const int*)p[6], (float*)p[7], (float*)p[8], l[0], l[1], l[2], l[3], l[4]);
}
extern "C" unsigned shared_size() { return sizeof(Shared); }""",
    "encode_scalar": """
extern "C" void go(unsigned grid, unsigned block, void** p, long long* l) {
    run(encode_scalar, grid, block, (const float*)p[0], (const float*)p[1], (const float*)p[2], (const float*)p[3], (const i64*)p[4], (const u8*)p[5],
        (u8*)p[6], (u8*)p[7], (float*)p[8], l[0], l[1], l[2], l[3]);
}
extern "C" unsigned shared_size() { return UNIT * D; }""",
    "encode_joint": """
extern "C" void go(unsigned grid, unsigned block, void** p, long long* l) {
    run(encode_joint, grid, block, (const float*)p[0], (const i64*)p[1], (const u8*)p[2], (const Tables*)p[3], (u8*)p[4], (u8*)p[5], l[0], l[1], l[2], l[3]);
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


def run_on_host(launch: Launch, device: torch.device | None = None) -> None:
    code = library(launch.kernel, frozenset(launch.definitions.items()))
    pointers = [a.data_ptr() if isinstance(a, Tensor) else None for a in launch.arguments if not isinstance(a, int)]
    numbers = [a for a in launch.arguments if isinstance(a, int)]
    code.go(launch.blocks, launch.threads, (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_longlong * len(numbers))(*numbers))
    assert code.shared_size() == launch.shared_bytes


def run_on_device(launch: Launch) -> None:
    launch.run(torch.device("cuda", 0))


def make(
    dim: int = 64,
    preset: str = "high",
    quantizer: str = "joint",
    decay: float = 0.03,
    device: str = "cpu",
    pairs: int | None = None,
    interleaved: bool = False,
    **choices: Any,
) -> LayerCodec:
    rotary = Rotary(synthetic.inv_freq(dim // 2 if pairs is None else pairs), interleaved)
    profile = synthetic.profile(2, dim, (0,), decay, rotary, **choices)
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


def units_before(units: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(units, dtype=torch.int32, device=device)


def same_share(got: Tensor, want: Tensor) -> float:
    return float((got == want).flatten(3).all(-1).float().mean()) if got.dim() == 4 else float((got == want).float().mean())


def plan_side(codec: LayerCodec, u: Tensor, records: Tensor, which: str) -> Encoding:
    side = getattr(codec, which)
    if isinstance(side.quantizer, JointPlanes):
        return plan_joint(side, joint_tables(side.quantizer), u.unflatten(2, (-1, UNIT)).mT.contiguous(), records)
    return plan_scalar(side, u, records, which == "key")


def check_side(codec: LayerCodec, u: Tensor, which: str, run: Callable[[Launch], None]) -> None:
    side, (batch, _, count, _) = getattr(codec, which), u.shape
    records = store(codec, batch, count // UNIT)
    part = 0 if which == "key" else 2
    view = codec.layout.split(records[:, :, 1 : 1 + count // UNIT])[part]
    launch = plan_side(codec, u, view, which)
    launch.gains.fill_(77)
    run(launch.launch)
    centred = (u.double() @ torch.linalg.inv(side.encode_matrix.double())).float()
    planes, gains = side.encode(centred)
    got = unpack_planes(view, which).flatten(2, 3)
    assert min(same_share(got, planes), same_share(launch.gains, gains)) > 1 - DIFFERENT * codec.head_dim
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
        launch = plan_side(codec, u, codec.layout.split(store(codec, 1, 1)[:, :, :1])[part], which)
        run_on_host(launch.launch)
        assert torch.equal(launch.gains, side.encode((u.double() @ torch.linalg.inv(side.encode_matrix.double())).float())[1])
        assert (launch.gains[:, :, 5] == 255).all() and (launch.gains[:, :, 6] == 1).all() and (launch.error is None or launch.error.isfinite().all())


def test_can_encode_says_what_the_kernels_know() -> None:
    assert not can_encode(make(quantizer="lloyd-max"))
    assert not can_encode(make(value_gain="search"))
    assert can_encode(make(quantizer="uniform", value_gain="search")) and not can_encode(make(quantizer="uniform", value_gain="wide"))
    assert not can_encode(make(quantizer="uniform", key_gain="wide"))


def test_encode_units_writes_what_the_codec_says() -> None:
    codec = make()
    keys, values = torch.randn(2, 2, 256, 64), torch.randn(2, 2, 256, 64)
    slots, start = torch.arange(128, 384), torch.tensor([0, 3])
    records = store(codec, 2, 2)
    encoded = encode_units(codec, keys, values, units_before(1), start, records[:, :, 1:3], kernels=False)
    planes, want_gains, value_planes, want_value_gains = codec.encode(keys, values, slots, start)
    key, _, value, _ = codec.layout.split(records[:, :, 1:3])
    assert torch.equal(unpack_planes(key, "key").flatten(2, 3), planes) and torch.equal(unpack_planes(value, "value").flatten(2, 3), value_planes)
    assert torch.equal(encoded.gains, want_gains) and torch.equal(encoded.value_gains, want_value_gains)
    assert torch.equal(codec.relative_error(encoded.key_error), codec.key_error(keys, planes, want_gains, slots, start))
    assert torch.equal(encoded.value_size, values.square().sum(-1))
    assert (records[:, :, 0] == 0xAA).all() and (records[:, :, 3:] == 0xAA).all()


WHITENING = {
    "128": {"dim": 128},
    "64, interleaved": {"interleaved": True},
    "80, a quarter turns": {"dim": 80, "pairs": 10},
    "96, interleaved, a half turns": {"dim": 96, "pairs": 24, "interleaved": True},
    "128, mean stays": {"dim": 128, "trajectory": False},
    "64, plain frame": {"run": 0},
    "240, two tiles of columns": {"dim": 240},
    "256": {"dim": 256},
}


def as_prefill(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, H, T, D] as attention layers hand it over: a part of a projection [B, T, 3 H D + 8] that is one element off a whole address, seen by head."""
    batch, heads, count, dim = shape
    whole = torch.randn(batch, count, 3 * heads * dim + 8, device=device).to(dtype)
    return whole[..., heads * dim + 1 : 2 * heads * dim + 1].unflatten(-1, (heads, dim)).transpose(1, 2)


def check_whitening(codec: LayerCodec, dtype: torch.dtype, which: str, by_coordinate: bool, run: Callable[[Launch], None]) -> None:
    """Against float64 from the codec's tables, as exact as PyTorch's float32. One sequence starts between these units: positions before are negative."""
    device, heads, dim = codec.key.mean.device, codec.key.mean.shape[0], codec.head_dim
    x, start, before = as_prefill((3, heads, 256, dim), dtype, device), torch.tensor([0, 1003, 1300], device=device), units_before(9, device)
    white = plan_whitening(codec, x, before, start, which == "key", by_coordinate)
    run(white.launch)
    centred = codec.centre_units(x, before, start) if which == "key" else codec.centre_values(x)
    want = centred.double() @ getattr(codec, which).encode_matrix.double()
    got = white.u.mT.flatten(2, 3) if by_coordinate else white.u
    assert float((got - want).norm() / want.norm()) < 4e-7
    assert (got - want).abs().max() < 4e-6 * want.abs().max()
    if white.sizes is not None:
        torch.testing.assert_close(white.sizes, x.double().square().sum(-1).float(), rtol=1e-6, atol=0)


@HOST
@pytest.mark.parametrize("options", WHITENING.values(), ids=WHITENING)
def test_whiten_on_the_host(options: dict, poison: None) -> None:
    codec = make(**options)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    kind = list(WHITENING.values()).index(options)
    check_whitening(codec, dtypes[kind % 3], "key", False, run_on_host)
    check_whitening(codec, dtypes[(kind + 1) % 3], "value", kind % 2 == 0, run_on_host)


def check_units(codec: LayerCodec, units: int) -> None:
    """Units in the middle of a store, by the reference and twice by the kernels: the same but for ties, and the same bits both times."""
    device, heads, dim = codec.key.mean.device, codec.key.mean.shape[0], codec.head_dim
    keys, values = (as_prefill((2, heads, units * UNIT, dim), torch.bfloat16, device) for _ in range(2))
    start = torch.tensor([0, 3], device=device)
    stores, before = [store(codec, 2, units) for _ in range(3)], units_before(3, device)
    got, want, again = (
        astuple(encode_units(codec, keys, values, before, start, s[:, :, 1 : 1 + units], k)) for s, k in zip(stores, (True, False, True), strict=True)
    )
    assert torch.equal(stores[0], stores[2]) and all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    for part, which in ((0, "key"), (2, "value")):
        mine, theirs = (unpack_planes(codec.layout.split(s[:, :, 1 : 1 + units])[part], which).flatten(2, 3) for s in stores[:2])
        assert same_share(mine, theirs) > 1 - DIFFERENT * codec.head_dim
    assert all(same_share(a, b) > 1 - DIFFERENT * codec.head_dim for a, b in zip(got[:2], want[:2], strict=True))
    torch.testing.assert_close(got[2].mean(1), want[2].mean(1), rtol=2e-2, atol=1e-4 * float(want[2].mean()))
    torch.testing.assert_close(got[3], want[3])
    assert all((s[:, :, 0] == 0xAA).all() and (s[:, :, 1 + units :] == 0xAA).all() for s in stores)


@HOST
@pytest.mark.parametrize("quantizer", ["joint", "uniform"])
def test_encode_units_by_kernels_on_the_host(quantizer: str, poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "run", run_on_host)
    check_units(make(quantizer=quantizer), 3)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*CASES.values(), {"dim": 256, "count": 384}], ids=[*CASES, "256"])
def test_encode_on_the_device(options: dict) -> None:
    options = dict(options)
    count = options.pop("count", 256)
    codec = make(**options, device="cuda")
    for which, u in zip(("key", "value"), vectors(codec, 4 * count), strict=True):
        check_side(codec, u, which, run_on_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", WHITENING.values(), ids=WHITENING)
def test_whiten_on_the_device(options: dict, dtype: torch.dtype) -> None:
    codec = make(**options, device="cuda")
    for which, by_coordinate in (("key", False), ("value", False), ("value", True)):
        check_whitening(codec, dtype, which, by_coordinate, run_on_device)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"dim": 128}, {"quantizer": "uniform"}], ids=["64", "128", "uniform"])
def test_encode_units_on_the_device(options: dict) -> None:
    check_units(make(**options, device="cuda"), 9)
