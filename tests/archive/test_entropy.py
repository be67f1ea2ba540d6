"""Bytes and symbols come back, cost what their entropy says, and damage is an error and nothing worse."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spectralquant.archive import entropy
from spectralquant.archive.entropy import MAX_SYMBOL, REACHES, compress, expand, pack_symbols, split_blocks, unpack_symbols
from spectralquant.errors import CacheFileError, DependencyError


def rounded(sd: float, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, sd, count).round().astype(np.int16)


def entropy_of(symbols: np.ndarray) -> float:
    share = np.unique(symbols, return_counts=True)[1] / len(symbols)
    return float(-(share * np.log2(share)).sum())


@settings(deadline=None)
@given(arrays.arrays(np.int16, st.integers(0, 300), elements=st.integers(-MAX_SYMBOL, MAX_SYMBOL)))
def test_any_symbols_come_back(symbols: np.ndarray) -> None:
    block = pack_symbols(torch.from_numpy(symbols))
    assert np.array_equal(unpack_symbols(block, len(symbols)).numpy(), symbols)
    assert split_blocks(block + block, 2) == [block, block]
    for damaged in (block + block[:-1], block + block + b"x"):
        with pytest.raises(CacheFileError, match=r"ends within|are left"):
            split_blocks(damaged, 2)


@pytest.mark.parametrize("sd", [0.02, 0.2, 0.5, 1.0, 3.0, 40.0, 5000.0])
def test_symbols_of_any_spread_come_back_and_cost_little_more_than_their_entropy(sd: float) -> None:
    symbols = rounded(sd, 200_000)
    block = pack_symbols(torch.from_numpy(symbols))
    assert np.array_equal(unpack_symbols(block, len(symbols)).numpy(), symbols)
    # Huffman codes of bytes that hold several symbols: 4 % above the entropy, and 0.05 bits where most bytes are zero.
    assert len(block) * 8 / len(symbols) < 1.04 * entropy_of(symbols) + 0.05


def test_few_spreads_use_every_reach() -> None:
    assert {pack_symbols(torch.from_numpy(rounded(sd, 20_000)))[0] for sd in (0.2, 0.35, 0.6, 0.7, 0.8, 1.0, 1.3, 2.0, 10.0)} == set(REACHES)


def test_a_frame_of_another_size_is_refused_before_anything_is_allocated() -> None:
    bomb = compress(bytes(1 << 28))
    assert len(bomb) < 1 << 15
    with pytest.raises(CacheFileError, match="268435456 bytes, expected 100"):
        expand(bomb, 100)
    with pytest.raises(CacheFileError, match="expected 100"):
        unpack_symbols(entropy._BLOCK.pack(127, len(bomb), 0) + bomb, 100)


@pytest.mark.parametrize("frame", [b"", b"no frame at all", compress(b"abc") + b"x", compress(b"abc")[:-1], compress(b"")])
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(CacheFileError):
        expand(frame, 3)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_block_is_an_error_or_other_symbols(data: st.DataObject) -> None:
    block = bytearray(pack_symbols(torch.from_numpy(rounded(data.draw(st.sampled_from([0.3, 1.0, 30.0])), 500))))
    for _ in range(data.draw(st.integers(1, 4))):
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(block)))
    for damaged in (bytes(block), bytes(block[:cut])):
        try:
            (whole,) = split_blocks(damaged, 1)
            found = unpack_symbols(whole, 500)
        except CacheFileError:
            continue
        assert len(found) == 500


def test_without_zstandard_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    entropy._zstd.cache_clear()
    with pytest.raises(DependencyError, match=r"spectralquant\[archive\]"):
        compress(b"abc")
    monkeypatch.undo()
    entropy._zstd.cache_clear()
