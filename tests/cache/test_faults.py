"""Whatever operation of PyTorch runs out of memory, and whatever line is interrupted: afterwards the cache holds what it held, and goes on."""

import copy
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_machine import LAYERS, codecs, finished, keys_and_values, view_of
from faults import FailingOperations, interrupted_line
from tiny_models import CONFIGS
from torch import Tensor
from transformers import DynamicCache

import spectralquant
from spectralquant.cache.hf import SpectralCache
from spectralquant.config import CacheConfig

CONFIG = CacheConfig(window=32, tile_tokens=256)
PACKAGE = str(Path(spectralquant.__file__).parent)
LONG, BLOCK_DUE = 450, 160
"""Tokens of a cache with three units packed and 66 in the window; tokens that fill the window, so that the next update packs a block."""
Change = Callable[[SpectralCache], Any]


@pytest.fixture(params=[False, True], ids=["at once", "later"], autouse=True)
def later(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether exact tokens are stored by the next operation, as on a GPU."""
    monkeypatch.setattr("spectralquant.cache.segment.waits_later", lambda device: request.param)
    return request.param


def tokens_of(layer: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    return keys_and_values(codecs("uniform")[layer], 2, count, 4 * seed + 1, torch.float32)  # a few should stay exact


def feed(cache: SpectralCache, count: int, seed: int) -> None:
    for layer in range(LAYERS):
        cache.update(*tokens_of(layer, count, seed), layer)


@cache
def filled(count: int) -> SpectralCache:
    layers = SpectralCache(CONFIGS["llama"], codecs("uniform"), CONFIG)
    del layers.layers[LAYERS:]
    if count:
        feed(layers, count, 1)
    return layers


def held_cache(count: int = LONG) -> SpectralCache:
    """A cache that shares nothing with others but constants."""
    layers = filled(count)
    shared = {id(constant): constant for layer in layers.coded_layers for constant in (layer.codec, layer.config)}
    other = SpectralCache(CONFIGS["llama"], codecs("uniform"), CONFIG)
    other.layers = [copy.deepcopy(layer, shared) for layer in layers.layers]
    return other


def content(cache: SpectralCache) -> list[list[Tensor]]:
    """What readers of every layer get, and what kernels count by; nothing for an empty layer."""
    out: list[list[Tensor]] = []
    for layer in cache.coded_layers:
        out.append([])
        if layer.segment is not None and layer.segment.length:
            segment = finished(layer.segment)
            view = view_of(segment)
            out[-1] = [view.dense("key"), view.dense("value"), segment.lengths, segment.secondary, segment.exact_slots[segment.exact_slots >= 0]]
    return out


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def dense_cache() -> DynamicCache:
    dense = DynamicCache()
    for layer in range(LAYERS):
        dense.update(*tokens_of(layer, 300, 5), layer)
    return dense


def pass_and_roll_back(count: int) -> Change:
    """A forward pass, as `generate` does it: it takes back what a pass that fails has left."""

    def change(cache: SpectralCache) -> None:
        before = cache.get_seq_length()
        try:
            feed(cache, count, 2)
        except BaseException:
            cache.roll_back(before)
            raise

    return change


CHANGES: dict[str, tuple[int, Change]] = {
    "first": (0, pass_and_roll_back(300)),
    "one token": (LONG, pass_and_roll_back(1)),
    "long": (LONG, pass_and_roll_back(400)),
    "block": (BLOCK_DUE, pass_and_roll_back(1)),
    "crop of the window": (LONG, lambda cache: cache.crop(-20)),
    "crop into units": (LONG, lambda cache: cache.crop(-200)),
    "crop to nothing": (LONG, lambda cache: cache.crop(-LONG)),
    "reorder": (LONG, lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
    "repeat": (LONG, lambda cache: cache.batch_repeat_interleave(2)),
    "select": (LONG, lambda cache: cache.batch_select_indices(torch.tensor([1]))),
    "copy": (LONG, lambda cache: cache.copy()),
    "fill": (0, lambda cache: cache.fill(dense_cache())),
    "size": (LONG, lambda cache: cache.nbytes),
}


PASSES = {"first", "one token", "long", "block"}
LONG_ONES = {"first", "long", "block", "fill", "crop into units"}


def acceptable(name: str, *more: SpectralCache) -> list[list[list[Tensor]]]:
    """What layers may hold after a change that failed: what they held. A pass that fails in a later layer may have packed blocks of earlier ones: these come
    back as their codes, and a block that was due stays packed."""
    count = CHANGES[name][0]
    caches = [held_cache(count), *more]
    if name in PASSES and count:
        due, cropped = held_cache(count), held_cache(count)
        for layer in due.coded_layers:
            layer.segment.pack_ready()
        CHANGES[name][1](cropped)
        cropped.roll_back(count)
        caches += [due, cropped]
    return [content(each) for each in caches]


def require_one_of(cache: SpectralCache, may_hold: list[list[list[Tensor]]], where: Any) -> None:
    for index, held in enumerate(content(cache)):
        assert any(same(held, want[index]) for want in may_hold), (where, index)


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", CHANGES)
def test_out_of_memory_at_every_operation(name: str, forever: bool) -> None:
    """The n-th fails, for every n (of long changes every 23rd); or all from the n-th on, so that nothing that cleans up may need memory."""
    (count, change), may_hold = CHANGES[name], acceptable(name)
    whole, step, n = held_cache(count), 23 if name in LONG_ONES else 1, 0
    change(whole)
    want = content(whole)
    for n in itertools.count(1, step):
        cache, failing = held_cache(count), FailingOperations(n, times=None if forever else 1)
        try:
            with failing:
                change(cache)
            break
        except torch.OutOfMemoryError:
            pass
        if forever and not cache.get_seq_length():
            continue  # `roll_back` that finds no memory gives up, and the text is read anew
        assert cache.get_seq_length() == count
        require_one_of(cache, may_hold, n)
        if n % 5 == 1 and name not in PASSES:
            change(cache)
            assert all(same(a, b) for a, b in zip(content(cache), want, strict=True))
    assert n > 5 or name in ("crop to nothing", "size")


@pytest.mark.parametrize("name", CHANGES)
def test_interrupted_at_every_line(name: str) -> None:
    """KeyboardInterrupt where a line of this package begins, every seventh, of long changes every 41st: a layer holds what it held, or what the call brings."""
    count, change = CHANGES[name]
    whole, step = held_cache(count), 41 if name in LONG_ONES else 7
    change(whole)
    may_hold, n = acceptable(name, whole), 0
    for n in itertools.count(1, step):
        cache = held_cache(count)
        with interrupted_line(n, PACKAGE) as place:
            try:
                change(cache)
            except KeyboardInterrupt:
                assert place
        if not place:
            break
        require_one_of(cache, may_hold, place)
    assert n > 10
