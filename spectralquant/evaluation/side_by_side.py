"""One prompt, generated from an uncompressed cache and from a compressed one of each preset: what came out, how many bytes it took, how far it is off."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from spectralquant.cache.hf import SpectralCache
from spectralquant.compat import cache_argument
from spectralquant.engine import SpectralQuantEngine
from spectralquant.prompts import as_message, encode, with_pad_token

CHUNK = 16
"""Tokens fed at a time when a continuation is scored, so that they read coded keys."""
UNCOMPRESSED = "FP16"


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt under one method. Bytes are of the cache at its end; KL (nats) and agreement are against the uncompressed model,
    over the tokens that the uncompressed model generated."""

    prompt: str
    method: str
    text: str
    context: int
    new_tokens: int
    cache_bytes: int
    fp16_bytes: int
    codec_bytes: int
    kl: float
    agreement: float
    prefill_seconds: float
    tokens_per_second: float

    @property
    def ratio(self) -> float:
        return self.fp16_bytes / self.cache_bytes

    @property
    def ratio_with_codec(self) -> float:
        return self.fp16_bytes / (self.cache_bytes + self.codec_bytes)


def bundled_prompts() -> list[tuple[str, str]]:
    """Title and text of four prompts of different kinds."""
    folder = files("spectralquant") / "data" / "prompts"
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    return [(f.name.removesuffix(".txt").split("_", 1)[1], f.read_text(encoding="utf-8").strip()) for f in found]


def compare(title: str, text: str, engines: Mapping[str, SpectralQuantEngine], model: Any, tokenizer: Any, count: int) -> Iterator[Run]:
    """The uncompressed run, then one for each of `engines`, as each is done; greedy, `count` new tokens."""
    ids, plain_config = encode(tokenizer, as_message(tokenizer, text), True, model.device).ids, model.config.get_text_config(decoder=True)
    plain = DynamicCache(config=plain_config)
    new, prefill, rate = _generate(model, tokenizer, ids, plain, count)
    reference = _continuation(model, ids, new, DynamicCache(config=plain_config))
    layers: list[Any] = list(plain.layers)
    held = sum(t.numel() * 2 for layer in layers for t in (layer.keys, layer.values))
    context, made = ids.shape[1], new.shape[1]
    yield Run(title, UNCOMPRESSED, _text(tokenizer, new), context, made, held, held, 0, 0.0, 1.0, prefill, rate)
    for name, engine in engines.items():
        with engine.applied_to(model):
            cache = engine.cache(model)
            own, prefill, rate = _generate(model, tokenizer, ids, cache, count)
            got = _continuation(model, ids, new, engine.cache(model))
        kl = float((reference.exp() * (reference - got)).sum(-1).mean())
        same = float((reference.argmax(-1) == got.argmax(-1)).float().mean())
        sizes = (cache.nbytes, cache.dense_bytes, cache.codec_bytes)
        yield Run(title, name, _text(tokenizer, own), context, own.shape[1], *sizes, kl, same, prefill, rate)


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, ids: Tensor, cache: DynamicCache | SpectralCache, count: int) -> tuple[Tensor, float, float]:
    """Greedy tokens [1, n], seconds of prefill (compression included), and decoded tokens per second."""
    began = time.perf_counter()
    model.base_model(input_ids=ids[:, :-1], use_cache=True, **cache_argument(model, cache))
    prefill = time.perf_counter() - began
    began = time.perf_counter()
    options = with_pad_token(model, tokenizer, {"do_sample": False, **cache_argument(model, cache)})
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
    new = out[:, ids.shape[1] :]
    return new, prefill, new.shape[1] / (time.perf_counter() - began)


@torch.no_grad()
def _continuation(model: Any, ids: Tensor, new: Tensor, cache: DynamicCache | SpectralCache) -> Tensor:
    """Log-probabilities [n, V] of every token of `new` after `ids`, the scored tokens fed in chunks."""
    model.base_model(input_ids=ids[:, :-1], use_cache=True, **cache_argument(model, cache))
    feed = torch.cat([ids[:, -1:], new[:, :-1]], 1)
    logits = [model(input_ids=chunk, use_cache=True, **cache_argument(model, cache)).logits[0] for chunk in feed.split(CHUNK, 1)]
    return torch.cat(logits).float().log_softmax(-1)


def _text(tokenizer: Any, new: Tensor) -> str:
    return tokenizer.decode(new[0], skip_special_tokens=True).strip()
