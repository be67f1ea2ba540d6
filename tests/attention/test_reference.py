"""Attention on codes == decode everything, then attend."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import ATTENTION
from torch import Tensor

from spectralquant.attention.reference import attend
from spectralquant.cache.segment import Segment
from spectralquant.codec.packed import PackedKV
from spectralquant.config import CacheConfig
from spectralquant.engine import SpectralQuantEngine


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got - want).double().norm() / want.double().norm())


def oracle(query: Tensor, kv: PackedKV, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Float64 softmax over decoded keys and values, column by column as in the definition. What mass lacks goes to the logits of coded slots."""
    keys, values = kv.dense("key").double(), kv.dense("value").double()
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    logits = query.double() @ keys.mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if kv.codec.missing_mass is not None:
        coded = (torch.arange(kv.length) < kv.packed).repeat(len(query), 1)
        for row, slots in enumerate(kv.exact_slots):
            coded[row, slots[slots >= 0].long()] = False
        logits = logits + coded[:, None, None] * kv.codec.missing_mass.double().flatten()[:, None, None]
    if mask is None:
        count, total = logits.shape[-2:]
        mask = torch.ones(count, total, dtype=torch.bool).tril(total - count)[None, None]
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)], -1)
    return (logits.softmax(-1)[..., : keys.shape[2]] @ values).to(query.dtype)


def filled(engine: SpectralQuantEngine, length: int, new: int, batch: int = 2, tile: int = 256, start: list[int] | None = None) -> PackedKV:
    """A view of `length` + `new` tokens of random keys with a large common part, as models have it."""
    codec = next(iter(engine.profile_codec().values()))
    heads, dim = codec.key.encode_matrix.shape[:2]
    keys = torch.randn(batch, heads, length + new, dim) + 2 * torch.randn(1, heads, 1, dim)
    values = torch.randn(batch, heads, length + new, dim)
    values[:, :, 200:203] *= 0.01  # secondary sinks
    begin = torch.tensor(start or [0] * batch)
    segment = Segment(codec, CacheConfig(window=16, tile_tokens=tile), keys, begin)
    assert segment.update(keys[:, :, :length], values[:, :, :length]) is None
    view = segment.update(keys[:, :, length:], values[:, :, length:])
    assert view is not None
    return view


@pytest.mark.parametrize("length", [1, 127, 128, 145, 300, 401, 900])
@pytest.mark.parametrize("new", [1, 5])
def test_attend(engine: SpectralQuantEngine, poison: None, length: int, new: int) -> None:
    kv = filled(engine, length, new)
    query = torch.randn(2, 2 * kv.shape[1], new, kv.shape[3])
    got = attend(query, kv, scale=0.3)
    assert relative_rms(got, oracle(query, kv, None, 0.3, None, None)) < ATTENTION


@pytest.mark.parametrize("length", [145, 401, 900])
def test_attend_lloyd_max(llama_calibration: Path, length: int) -> None:
    lloyd = SpectralQuantEngine(quantizer="lloyd-max")
    lloyd.load_calibration(llama_calibration)
    kv = filled(lloyd, length, 5)
    query = torch.randn(2, 2 * kv.shape[1], 5, kv.shape[3])
    assert relative_rms(attend(query, kv, scale=0.3), oracle(query, kv, None, 0.3, None, None)) < ATTENTION


def test_attend_masked_columns(engine: SpectralQuantEngine) -> None:
    """Left padding hides packed, exact and raw slots; padded slots carry no code either."""
    kv = filled(engine, 500, 3, start=[0, 150])
    mask = torch.ones(3, 503, dtype=torch.bool).tril(500)[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :150] = False
    query = torch.randn(2, 2 * kv.shape[1], 3, kv.shape[3])
    assert relative_rms(attend(query, kv, mask), oracle(query, kv, mask, kv.shape[3] ** -0.5, None, None)) < ATTENTION


def test_attend_softcap_and_sinks(engine: SpectralQuantEngine) -> None:
    kv = filled(engine, 420, 2)
    query = torch.randn(2, 2 * kv.shape[1], 2, kv.shape[3])
    sinks = torch.randn(2 * kv.shape[1])
    got = attend(query, kv, scale=0.5, softcap=5.0, sinks=sinks)
    assert relative_rms(got, oracle(query, kv, None, 0.5, 5.0, sinks)) < ATTENTION


def test_attend_tile_size_does_not_matter(engine: SpectralQuantEngine) -> None:
    torch.manual_seed(3)
    small = filled(engine, 1300, 1, tile=256)
    torch.manual_seed(3)
    large = filled(engine, 1300, 1, tile=1024)
    query = torch.randn(2, 2 * small.shape[1], 1, small.shape[3])
    assert relative_rms(attend(query, small), attend(query, large)) < ATTENTION


def test_attend_row_that_sees_nothing_is_zero(engine: SpectralQuantEngine) -> None:
    kv = filled(engine, 300, 1)
    query = torch.randn(2, 2 * kv.shape[1], 1, kv.shape[3])
    mask = torch.ones(2, 1, 1, 301, dtype=torch.bool)
    mask[1] = False
    out = attend(query, kv, mask)
    assert (out[1] == 0).all() and out.isfinite().all()


def test_attend_adds_the_missing_mass_to_coded_tokens_alone(engine: SpectralQuantEngine) -> None:
    """With nothing coded it changes nothing; where coded tokens are, their share of every query head grows by exp(c)."""
    kv = filled(engine, 500, 2)
    without = replace(kv, codec=replace(kv.codec, missing_mass=None))
    query = torch.randn(2, 2 * kv.shape[1], 2, kv.shape[3])
    for c in (torch.randn(kv.shape[1], 2), torch.full((kv.shape[1], 2), -0.7)):
        other = replace(kv, codec=replace(kv.codec, missing_mass=c))
        assert relative_rms(attend(query, other), oracle(query, other, None, kv.shape[3] ** -0.5, None, None)) < ATTENTION
        assert relative_rms(attend(query, other), attend(query, without)) > 0.01
    short = filled(engine, 100, 1)
    assert short.packed == 0
    query = query[:, :, :1]
    assert torch.equal(attend(query, short), attend(query, replace(short, codec=replace(short.codec, missing_mass=None))))
