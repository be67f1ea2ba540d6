"""Texts that caches have read, and a process that stores them: spawned ones import it by its name."""

import random
from pathlib import Path
from typing import Any

import torch
from near_lossless import tokens
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant import PrefixStore, SpectralCache, SpectralQuantEngine
from spectralquant.compat import cache_argument


@torch.no_grad()
def read(engine: SpectralQuantEngine, model: PreTrainedModel, ids: Tensor) -> SpectralCache:
    cache = engine.cache(model)
    model(ids, **cache_argument(model, cache))
    return cache


@torch.no_grad()
def logits(model: PreTrainedModel, cache: SpectralCache, ids: Tensor) -> Tensor:
    return model(ids, **cache_argument(model, cache.copy())).logits


def work_with_evictions(directory: Path, calibration: Path, seed: int, ready: Any) -> None:
    """A process that saves, loads and evicts as others do."""
    torch.set_num_threads(1)
    engine, model = SpectralQuantEngine(), tiny_model("llama")
    engine.load_calibration(calibration)
    torch.manual_seed(7)
    texts = [tokens(400 + 60 * i) for i in range(5)]
    caches = [read(engine, model, ids) for ids in texts]
    store, choose = PrefixStore(directory, 250_000), random.Random(seed)
    ready.wait()
    for _ in range(40):
        i = choose.randrange(5)
        if choose.random() < 0.5:
            store.save(caches[i], texts[i])
        other = engine.cache(model)
        if store.load(other, texts[i]).exact:
            more = torch.full((1, 1), 5)
            assert torch.equal(logits(model, other, more), logits(model, caches[i], more))
