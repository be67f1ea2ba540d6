"""Which tokens stay exact: the rule in plain Python, PyTorch, and the kernels of exact.cu, on the host everywhere and on the device with a GPU."""

import ctypes
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import synthetic
import torch
from host_kernels import compile_for_host
from torch import Tensor

from spectralquant.cache import exact, exact_cuda
from spectralquant.cache.exact import EARLY, ExactBound, ExactTokens, entries_used, within_bound
from spectralquant.cache.segment import Segment
from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.codec.layout import UNIT
from spectralquant.codec.units import EncodedUnits, encode_units
from spectralquant.config import CacheConfig, Dials
from spectralquant.kernels.launch import Launch
from spectralquant.presets import PRESETS

LAUNCHERS = """
extern "C" void exact_need_(unsigned grid, unsigned block, void** p, long long* l, double* f) {
    run(exact_need, grid, block, (const float*)p[0], (const float*)p[1], (const float*)p[2], (const i64*)p[3], (const int*)p[4], (float*)p[5],
        (int*)p[6], l[0], l[1], l[2], (float)f[0], (float)f[1]);
}
extern "C" void choose_exact_(unsigned grid, unsigned block, void** p, long long* l, double* f) {
    run(choose_exact, grid, block, (const float*)p[0], (const int*)p[1], (const i64*)p[2], (const int*)p[3], (const i64*)p[4], (const u8*)p[5],
        (const u8*)p[6], (u8*)p[7], (u8*)p[8], (i64*)p[9], (int*)p[10], l[0], l[1], l[2], l[3], l[4], l[5], f[0]);
}
extern "C" void store_exact_(unsigned grid, unsigned block, void** p, long long* l, double* f) {
    run(store_exact, grid, block, (const u16*)p[0], (const u16*)p[1], (const int*)p[2], (const i64*)p[3], (const i64*)p[4], (const i64*)p[5],
        (const int*)p[6], (int*)p[7], (u16*)p[8], (u16*)p[9], l[0], l[1], l[2], l[3], l[4], l[5], l[6], l[7], l[8], l[9], l[10]);
}
extern "C" unsigned sizes() { return sizeof(Choosing) << 8 | sizeof(UnitBound); }
"""
HOST = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@cache
def library(definitions: frozenset[tuple[str, int]]) -> ctypes.CDLL:
    return compile_for_host("exact.cu", dict(definitions), LAUNCHERS, Path(mkdtemp()))


def run_on_host(launch: Launch, device: torch.device) -> None:
    code = library(frozenset(launch.definitions.items()))
    assert code.sizes() == exact_cuda._CHOOSING << 8 | exact_cuda._BOUND
    pointers = [a.data_ptr() for a in launch.arguments if isinstance(a, Tensor)]
    numbers = [a for a in launch.arguments if isinstance(a, int)]
    floats = [float(a) for a in launch.arguments if not isinstance(a, Tensor | int)]
    kinds = ((ctypes.c_void_p, pointers), (ctypes.c_longlong, numbers), (ctypes.c_double, floats))
    code[f"{launch.kernel}_"](launch.blocks, launch.threads, *((kind * len(values))(*values) for kind, values in kinds))


def make(device: str = "cpu", **changes: float) -> LayerCodec:
    profile = synthetic.profile(2, 64, (0,), exact_share=0.01)
    return replace(build_codec(profile, PRESETS["high"], Dials(), device, "uniform")[0], **changes)


def units_before(first: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(first // UNIT, dtype=torch.int32, device=device)


def encoded_units(codec: LayerCodec, units: int, odd: float, batch: int = 3) -> EncodedUnits:
    """Made up; a share `odd` of the tokens has tiny values, or keys far off, some as far as others."""
    shape, device = (batch, 2, units * UNIT), codec.key.mean.device
    error, size = torch.rand(shape) * codec.key_expected, torch.rand(shape) + 0.5
    size[(torch.rand(shape[0], 1, shape[2]) < odd / 2).expand(shape)] *= 1e-3
    error[(torch.rand(shape[0], 1, shape[2]) < odd / 2).expand(shape)] = 100 * codec.key_expected
    gains = (torch.randint(1, 256, shape, dtype=torch.uint8, device=device) for _ in range(2))
    return EncodedUnits(*gains, error.to(device), size.to(device) * codec.value_norm[:, None])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.04])
@pytest.mark.parametrize("wanted", [0.005, 0.03, 0.5])
@pytest.mark.parametrize("by_codec", [False, True])
def test_within_bound_takes_the_neediest_of_every_unit(share: float, wanted: float, by_codec: bool) -> None:
    """Against the rule applied unit by unit in plain Python."""
    config, bound = (CacheConfig(), share) if by_codec else (CacheConfig(max_exact_share=share), 1.0)
    need = torch.rand(2, 12 * UNIT) * (torch.rand(2, 12 * UNIT) < wanted)
    got = within_bound(need, units_before(0), torch.zeros(2, dtype=torch.int64), ExactBound.of(make(exact_bound=bound), config))
    for row in range(2):
        used = 0
        for unit in range(12):
            mine = need[row, unit * UNIT : (unit + 1) * UNIT]
            count = min(int((mine > 0).sum()), int(share * UNIT * (unit + 1)) + (EARLY if share else 0) - used)
            used += count
            want = set(mine.argsort(descending=True)[:count].tolist())
            assert set(got[row, unit * UNIT : (unit + 1) * UNIT].nonzero()[:, 0].tolist()) == want


def check_choice(codec: LayerCodec, config: CacheConfig, odd: float, first: int) -> None:
    """By kernels and by the reference: the same tokens, counts and records; and both copy what was chosen to the entries after those in use."""
    units, device = 5, codec.key.mean.device
    encoded, before = encoded_units(codec, units, odd), units_before(first, device)
    start, secondary = torch.tensor([0, 130, 641], device=device), torch.tensor([0, 2, 1], device=device)
    records = torch.full((3, 2, units + 3, codec.layout.record_bytes), 0xAA, dtype=torch.uint8, device=device)
    want_records = records.clone()
    got, want = (
        module.choose_exact(codec, config, encoded, before, start, secondary, r[:, :, 2 : 2 + units])
        for module, r in ((exact_cuda, records), (exact, want_records))
    )
    assert torch.equal(got.secondary, want.secondary) and torch.equal(records, want_records)
    used = entries_used(before, start, secondary, config.sinks)
    total = entries_used(before + units, start, want.secondary, config.sinks)
    for row, count in enumerate((total - used).tolist()):
        assert torch.equal(got.tokens[row, :count], want.tokens[row, :count])
    check_copies((got, want), first, start, secondary, config.sinks, used, total)


def check_copies(choices: tuple[ExactTokens, ExactTokens], first: int, start: Tensor, secondary: Tensor, sinks: int, used: Tensor, total: Tensor) -> None:
    """A store with as much room as one sequence needs, or more; keys and values as attention layers hand them over. Against a loop."""
    device, count = start.device, choices[0].tokens.shape[1]
    keys, values = (torch.randn(3, count, 2, 64, device=device).bfloat16().transpose(1, 2) for _ in range(2))
    for room in (int(total.max()), int(total.max()) + 9):
        slots = torch.full((3, room), -1, dtype=torch.int32, device=device)
        store = (slots, *(torch.randn(3, 2, room, 64, device=device).bfloat16() for _ in range(2)))
        want = tuple(t.clone() for t in store)
        for row, (begin, end) in enumerate(zip(used.tolist(), total.tolist(), strict=True)):
            for to, token in zip(range(begin, end), choices[1].tokens[row].tolist(), strict=False):
                want[0][row, to], want[1][row, :, to], want[2][row, :, to] = first + token, keys[row, :, token], values[row, :, token]
        for module, choice in zip((exact_cuda, exact), choices, strict=True):
            got = tuple(t.clone() for t in store)
            module.store_exact(choice, units_before(first, device), start, secondary, sinks, keys, values, got)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


CHOICES = pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, CacheConfig()),
        ({}, CacheConfig(sinks=0, max_exact_share=0.0)),
        ({}, CacheConfig(sinks=64)),
        ({"exact_below": 0.0}, CacheConfig()),
        ({"exact_error": 0.0, "exact_bound": 1.0}, CacheConfig(max_exact_share=0.25)),
    ],
    ids=["default", "none", "many sinks", "keys only", "values only"],
)


@HOST
@CHOICES
@pytest.mark.parametrize("odd", [0.004, 0.3])
def test_choose_exact_on_the_host(changes: dict, config: CacheConfig, odd: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "run", run_on_host)
    for first in (0, 640):
        check_choice(make(**changes), config, odd, first)


def filled_segment(device: str, by_kernels: bool) -> Segment:
    """A cache filled in pieces: exact tokens are in order of their slots, sinks first, and as they came."""
    codec = make(device)
    keys, values = (torch.randn(2, 900, 2, 64, generator=torch.Generator().manual_seed(seed)).transpose(1, 2).half().to(device) for seed in (1, 2))
    values[:, :, 200:800:37] *= 1e-3
    segment = Segment(codec, CacheConfig(window=32, tile_tokens=256), keys, torch.tensor([0, 7], device=device))
    segment.encode_kernels = by_kernels
    for part in (slice(0, 300), *(slice(i, i + 1) for i in range(300, 700)), slice(700, 900)):  # three pieces, of which the second is decoding
        segment.update(keys[:, :, part], values[:, :, part])
    used = segment.exact_slots >= 0
    assert (used.sum(-1) > segment.config.sinks + 1).all()
    for row in range(2):
        slots = segment.exact_slots[row][used[row]].long()
        assert torch.equal(slots, slots.sort().values) and torch.equal(slots[:4].cpu(), torch.arange(4) + (0, 7)[row])
        assert torch.equal(segment.exact_keys[row][:, used[row]], keys[row][:, slots]) and torch.equal(
            segment.exact_values[row][:, used[row]], values[row][:, slots]
        )
    return segment


def test_segment_stores_exact_tokens() -> None:
    filled_segment("cpu", False)


@HOST
def test_segment_stores_exact_tokens_by_kernels_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    want = filled_segment("cpu", False)
    monkeypatch.setattr(Launch, "run", run_on_host)
    monkeypatch.setattr("spectralquant.cache.segment.encode_units", lambda *args: encode_units(*args[:-1], kernels=False))  # only what comes after
    got = filled_segment("cpu", True)
    for name in ("records", "exact_slots", "exact_keys", "exact_values", "secondary", "lengths"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.gpu
@CHOICES
@pytest.mark.parametrize("odd", [0.004, 0.3])
def test_choose_exact_on_the_device(changes: dict, config: CacheConfig, odd: float) -> None:
    for first in (0, 640):
        check_choice(make("cuda", **changes), config, odd, first)


@pytest.mark.gpu
def test_segment_stores_exact_tokens_on_the_device() -> None:
    filled_segment("cuda", True)
