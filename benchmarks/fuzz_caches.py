"""Files of caches, of a prefix store and of archives, for `fuzz_readers.py`: two tiny random models, one with a sliding window, with made-up spectra."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from decoding import made_up_profile
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from spectralquant import PrefixStore, SpectralCache, SpectralQuantEngine
from spectralquant.archive.predictor import ArchiveModel, Moments, fit_archive, load_archive
from spectralquant.cache.state import capture_cache, restore_cache
from spectralquant.calibration.hf import known_fingerprint
from spectralquant.codec.packed import plain_arithmetic
from spectralquant.compat import cache_argument
from spectralquant.prefix_store.entries import Block, Tail, joined
from spectralquant.prefix_store.shape import StoredShape
from spectralquant.profile import Profile

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "head_dim": 32}
TOKENS = 300
"""A block, and a window."""


@cache
def llama() -> tuple[Any, SpectralQuantEngine]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)).eval()
    return model, SpectralQuantEngine.of(made_up_profile(2, 1, 32), quantizer="uniform")


@cache
def gemma() -> tuple[Any, SpectralQuantEngine]:
    """Layer 0 has a sliding window, layer 1 is coded."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=1, sliding_window=64, query_pre_attn_scalar=32)).eval()
    whole = made_up_profile(2, 1, 32)
    whole.layers.pop(0)
    return model, SpectralQuantEngine.of(whole, quantizer="uniform")


@torch.no_grad()
def filled(model: Any, engine: SpectralQuantEngine) -> tuple[SpectralCache, Tensor]:
    torch.manual_seed(1)
    made, ids = engine.cache(model), torch.randint(0, 64, (1, TOKENS))
    model(ids, **cache_argument(model, made))
    return made, ids


@torch.no_grad()
def go_on(model: Any, held: SpectralCache) -> None:
    """As a call of `generate` does, on a copy."""
    batch = len(held.coded_layers[0].segment.start)  # pyright: ignore[reportOptionalMemberAccess]
    model(torch.zeros(batch, 2, dtype=torch.long), **cache_argument(model, held.copy()))


def content(held: SpectralCache) -> dict[str, Any]:
    """All that a cache holds, and the tokens of a prefix."""
    state = capture_cache(held.copy())  # of a copy units are always a prefix
    return {**state.tensors(), "flags": state.flags, "ids": held.prefix_ids}


def make_cache(folder: Path) -> Path:
    held, ids = filled(*llama())
    return held.save(folder / "cache", ids)


def make_sliding(folder: Path) -> Path:
    held, _ = filled(*gemma())
    held.batch_repeat_interleave(2)
    return held.save(folder / "cache")


def read_cache(path: Path) -> SpectralCache:
    return SpectralCache.load(path, *llama())


def read_sliding(path: Path) -> SpectralCache:
    return SpectralCache.load(path, *gemma())


def make_store(folder: Path, kind: str) -> Path:
    held, ids = filled(*gemma())
    store = PrefixStore(folder / "store")
    store.save(held, ids)
    return next(entry.path for entry in store.entries() if entry.kind == kind)


def make_archived_block(folder: Path) -> Path:
    path = make_store(folder, "block")
    PrefixStore(folder / "store").archive(-1.0)
    return path


def read_block(path: Path) -> Block:
    model, engine = gemma()
    return Block.read(path, StoredShape.of(engine.cache(model)).layers)


@cache
def stored() -> tuple[Block, Tail]:
    """What belongs together."""
    held, ids = filled(*gemma())
    state, shape = capture_cache(held), StoredShape.of(held)
    return Block.of(state, 0, ids[0, :128], shape.layers.layout, 0.1), Tail.of(state, ids[0], 0.1)


def use_entry(block: Block | None = None, tail: Tail | None = None) -> None:
    """As `PrefixStore.load` does."""
    model, engine = gemma()
    held = engine.cache(model)
    shape = StoredShape.of(held)
    with plain_arithmetic(torch.device("cpu")):
        state = joined([block or stored()[0]], tail or stored()[1], shape.layers, shape.half, shape.dtype)
        restore_cache(held, state, shape.config, held.device_of)
    go_on(model, held)


def archived_profile() -> Profile:
    return replace(made_up_profile(2, 1, 32), model=known_fingerprint(llama()[0]))


@cache
def archive() -> ArchiveModel:
    """Fitted on random keys and values."""
    profile = archived_profile()
    moments = Moments(profile)
    make = torch.Generator().manual_seed(0)
    moments.add({i: (torch.randn(1, 512, 32, generator=make), torch.randn(1, 512, 32, generator=make)) for i in profile.layers})
    return fit_archive(profile, moments)


def make_archive_model(folder: Path) -> Path:
    return archive().save(folder / "archive")


def read_archive_model(path: Path) -> ArchiveModel:
    return load_archive(path, archived_profile())


def make_archived(folder: Path) -> Path:
    model, engine = llama()
    _, ids = filled(model, engine)
    engine.archive_prefix(model, SimpleNamespace(pad_token_id=0, eos_token_id=1), ids, folder / "prefix", archive())
    return folder / "prefix.safetensors"


def read_archived(path: Path) -> SpectralCache:
    model, engine = llama()
    return engine.load_archived(path, model, archive())
