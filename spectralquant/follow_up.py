"""`model.generate` for caches that hold a prefix: works on a copy, and takes the new tokens alone or the whole text.

transformers takes a non-empty cache to hold the first tokens of `input_ids` and slices them off. A user who compressed a document
once wants to pass a question alone, several times. So on a model that an engine was applied to, `generate` puts the prefix in front
when it is missing, hands transformers a copy of the cache, and takes the prefix off the result. Everything else passes through.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant.cache.hf import SpectralCache, cache_argument
from spectralquant.decode_graph import graphed_steps
from spectralquant.errors import ConfigError

CACHE_ARGUMENTS = ("past_key_values", "cache")
"""Names of the cache in `generate`: before transformers 5.24, and since."""


def install_generate(model: Any) -> None:
    """Wrap this instance's `generate`."""
    original = model.generate

    @wraps(original)
    def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        name = next((n for n in CACHE_ARGUMENTS if isinstance(kwargs.get(n), SpectralCache)), None)
        if name is None:
            return original(inputs, *args, **kwargs)
        cache = kwargs.pop(name)
        if not kwargs.setdefault("use_cache", True):  # some configurations say False (MPT), and then every step would put the whole text in
            raise ConfigError("generate was given a cache and use_cache=False; leave use_cache out")
        target = cache_argument(model, cache)
        if cache.prefix_ids is not None:
            return _follow_up(original, model, inputs, args, kwargs, cache)
        mask = kwargs.get("attention_mask")
        if mask is not None and cache.get_seq_length() == 0:
            cache.set_padding(mask)
        with graphed_steps(model, cache):
            return original(inputs, *args, **target, **kwargs)

    model.generate = generate


def remove_generate(model: PreTrainedModel) -> None:
    """Undo `install_generate`."""
    model.__dict__.pop("generate", None)


def _follow_up(original: Any, model: Any, inputs: Tensor | None, args: Any, kwargs: dict[str, Any], held: SpectralCache) -> Any:
    prefix, cache = held.prefix_ids, held.copy()
    assert prefix is not None
    cache.prefix_ids = None
    ids = kwargs.pop("input_ids", inputs)
    if ids is None:
        raise ConfigError("generate was given a cache and no input_ids; pass the new tokens, or the whole text")
    prefix = prefix.to(ids.device)
    batch, width = ids.shape[0], prefix.shape[1]
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    whole = ids.shape[1] >= width and bool((ids[:, :width] == prefix).all())
    if whole and ids.shape[1] == width:
        cache.crop(-1)  # generation needs one token to start from
    if not whole:
        ids = torch.cat([prefix.expand(batch, -1), ids], 1)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones((batch, width)), mask], 1)
        if kwargs.get("max_length") is not None:
            kwargs["max_length"] += width
    with graphed_steps(model, cache):
        out = original(ids, *args, **cache_argument(model, cache), **kwargs)
    if whole:
        return out
    if isinstance(out, Tensor):
        return out[:, width:]
    out.sequences = out.sequences[:, width:]
    return out
