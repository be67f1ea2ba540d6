"""Three families: plain, with biases and one KV head, and with soft-cap and sliding layers."""

from collections.abc import Iterator

import pytest
from near_lossless import Pair
from tiny_models import tiny_model

_pairs: dict[str, Pair] = {}


@pytest.fixture(params=["llama", "qwen2", "gemma2"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield from _borrow(request.param)


@pytest.fixture
def llama_pair() -> Iterator[Pair]:
    yield from _borrow("llama")


@pytest.fixture
def gemma2_pair() -> Iterator[Pair]:
    yield from _borrow("gemma2")


def _borrow(family: str) -> Iterator[Pair]:
    if family not in _pairs:
        _pairs[family] = Pair.of(tiny_model(family))
    yield _pairs[family]
    _pairs[family].engine.remove_from(_pairs[family].model)
