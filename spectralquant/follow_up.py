"""`model.generate` for packed caches: of a prefix it works on a copy, and takes the new tokens alone or the whole text.

transformers takes a non-empty cache to hold the first tokens of `input_ids` and slices them off. A user who compressed a document
once wants to pass a question alone, several times. So on a model that an engine was applied to, `generate` puts the prefix in front
when it is missing, hands transformers a copy of the cache, and takes the prefix off the result. A call that fails leaves the cache
as it found it. Assisted decoding and prompts in pieces go on from no cache in some releases (what they give then is wrong, without a word): the one finds the
cache empty, the other reads its text at once. Everything else passes through.
"""

import logging
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant.cache.hf import SpectralCache
from spectralquant.calibration.hf import known_fingerprint
from spectralquant.compat import ASSISTED_READS_ALL, CACHE_ARGUMENTS, INSTALLED, PIECES_READ_ALL, cache_argument
from spectralquant.decode_graph import graphed_steps
from spectralquant.errors import ConfigError
from spectralquant.generation_options import finishing_tokens, is_assisted, last_length, prefill_piece, sequences_each

_log = logging.getLogger("spectralquant")


class Generate:
    """One model's `generate`. An object and no closure, so a copy of the model gets one of its own.

    Args:
        model: The model.
    """

    model: Any
    original: Callable[..., Any]

    def __init__(self, model: Any) -> None:
        self.model, self.original = model, model.generate
        update_wrapper(self, self.original)

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        name = next((n for n in CACHE_ARGUMENTS if isinstance(kwargs.get(n), SpectralCache)), None)
        if name is None:
            return self.original(inputs, *args, **kwargs)
        cache = kwargs.pop(name)
        if not kwargs.setdefault("use_cache", True):  # some configurations say False (MPT), and then every step would put the whole text in
            raise ConfigError("generate was given a cache and use_cache=False; leave use_cache out")
        self._require_own(cache)
        if cache.prefix_ids is not None:
            return self._follow_up(inputs, args, kwargs, cache)
        mask, before = kwargs.get("attention_mask"), cache.get_seq_length()
        if mask is not None and before == 0:
            cache.set_padding(mask)
        try:
            return self._run(inputs, args, kwargs, cache)
        except BaseException:
            cache.roll_back(before)
            raise

    def _run(self, inputs: Tensor | None, args: Any, kwargs: dict[str, Any], cache: SpectralCache) -> Any:
        options, ids = self._options(args, kwargs), kwargs.get("input_ids", inputs)
        if ASSISTED_READS_ALL and cache.get_seq_length() and is_assisted(self.model, options):
            _log.warning("assisted decoding of %s can't go on from a cache; the whole text is read anew", INSTALLED)
            cache.reset()
            if kwargs.get("attention_mask") is not None:
                cache.set_padding(kwargs["attention_mask"])
        if PIECES_READ_ALL and cache.get_seq_length() and prefill_piece(self.model, options):
            _log.warning("prefill_chunk_size of %s can't go on from a cache; what comes behind the cache is read at once", INSTALLED)
            kwargs["prefill_chunk_size"] = None
        cache.expect(last_length(self.model, options, ids.shape[1]) if isinstance(ids, Tensor) else None)
        try:
            with graphed_steps(self.model, cache, finishing_tokens(self.model, options)):
                return self.original(inputs, *args, **cache_argument(self.model, cache), **kwargs)
        finally:
            cache.expect(None)

    def _require_own(self, cache: SpectralCache) -> None:
        if cache.identity is not None and cache.identity.weights != known_fingerprint(self.model)["weights"]:
            raise ConfigError(f"the cache was made for another model than this {type(self.model).__name__}; make one with engine.cache(model)")

    def _follow_up(self, inputs: Tensor | None, args: Any, kwargs: dict[str, Any], held: SpectralCache) -> Any:
        prefix, cache = held.prefix_ids, held.copy()
        assert prefix is not None
        cache.prefix_ids = None
        ids = kwargs.pop("input_ids", inputs)
        if ids is None:
            raise ConfigError("generate was given a cache and no input_ids; pass the new tokens, or the whole text")
        prefix = prefix.to(ids.device)
        batch, width = ids.shape[0], prefix.shape[1]
        rows = batch * sequences_each(self.model, self._options(args, kwargs))
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        whole = ids.shape[1] >= width and bool((ids[:, :width] == prefix).all())
        if whole and ids.shape[1] == width:
            cache.roll_back(width - 1)  # generation needs one token to start from
        if not whole:
            ids = torch.cat([prefix.expand(batch, -1), ids], 1)
            mask = kwargs.get("attention_mask")
            if mask is not None:
                kwargs["attention_mask"] = torch.cat([mask.new_ones((batch, width)), mask], 1)
            if kwargs.get("max_length") is not None:
                kwargs["max_length"] += width
        out = self._run(ids, args, kwargs, cache)
        if whole:
            return out
        if isinstance(out, Tensor):
            return out[:, width:]
        out.sequences = out.sequences[:, width:]
        return out

    def _options(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs`, with a configuration that came by its place."""
        return {"generation_config": args[0], **kwargs} if args else kwargs


def install_generate(model: Any) -> None:
    """Wrap this instance's `generate`."""
    model.generate = Generate(model)


def remove_generate(model: PreTrainedModel) -> None:
    """Undo `install_generate`."""
    model.__dict__.pop("generate", None)
