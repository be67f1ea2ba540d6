"""A store in one call of `generate` or `compress_prefill`: what is there is loaded, the rest of the prompt is read, what is new is stored.

All but the last token of the prompt is read before the call itself, whether it was stored or not, and the last one attends to codes. So a prompt that was
stored as a whole gives the same logits, to the bit, as the call that stored it; and layers that can't go back are where the call begins.
"""

import logging
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant.cache.hf import SpectralCache
from spectralquant.compat import cache_argument, last_logits
from spectralquant.errors import ConfigError
from spectralquant.prefix_store.entries import Tail
from spectralquant.prefix_store.store import Hit, PrefixStore, snapshot

_log = logging.getLogger("spectralquant")


class StoreUse:
    """What one call does with a store. A store that can't be written is a warning, not an error: the answer is there.

    Args:
        store: The store.
        cache: Empty.
        ids: [1, T] int64, the prompt.

    Raises:
        ConfigError: `store` is none, or `ids` has several sequences.
    """

    def __init__(self, store: PrefixStore, cache: SpectralCache, ids: Tensor) -> None:
        if not isinstance(store, PrefixStore):
            raise ConfigError(f"store is a {type(store).__name__}, expected a spectralquant.PrefixStore, or None")
        if len(ids) != 1:
            raise ConfigError(f"the prompt holds {len(ids)} sequences, a store takes one at a time: call generate once for each, or leave store out")
        self._store, self._cache, self._ids = store, cache, ids
        self._hit, self._tail, self._rows = Hit(), None, 1
        self._seconds = self._save_seconds = 0.0
        self._written = 0

    def read_prompt(self, model: PreTrainedModel, rows: int = 1, piece: int | None = None) -> None:
        """Let the cache hold all of the prompt but its last token.

        Args:
            model: Reads what is not stored.
            rows: Sequences that go on from there: beams, samples.
            piece: Tokens that go through the model at a time; None: all.
        """
        front = self._ids[:, :-1]
        if not front.numel():
            return
        self._hit = self._store.load(self._cache, front)
        began = _now(front)
        rest = front[:, self._hit.tokens :]
        with torch.no_grad():
            for part in rest.split(piece or max(rest.shape[1], 1), 1) if rest.numel() else ():
                model(input_ids=part, use_cache=True, **cache_argument(model, self._cache), **last_logits(model))
        if rest.numel():
            self._seconds = (_now(front) - began) / rest.shape[1]
        self._tail: Tail | None = snapshot(self._cache, front, self._seconds)
        self._rows = rows
        if rows > 1:
            self._cache.batch_repeat_interleave(rows)

    def end(self, sequences: Tensor) -> None:
        """Store what was read, prompt and new tokens: sequences [rows, T'] int64. Of several rows the prompt alone is stored."""
        began = time.perf_counter()
        text = sequences if self._rows == 1 else self._ids
        held = min(self._cache.get_seq_length(), text.shape[1])
        try:
            self._written = self._store.save(self._cache, text[:1, :held], self._seconds, self._tail) if self._tail is not None else 0
        except OSError as error:
            _log.warning("the prefix can't be stored in %s (%s)", self._store.directory, error.strerror or error)
        self._save_seconds = time.perf_counter() - began

    def stats(self) -> dict[str, Any]:
        """{hit_tokens, exact, load_seconds, saved_seconds, written_bytes, save_seconds}; `saved_seconds`: what the tokens took when they were computed, less
        what loading them took."""
        hit = self._hit
        return {
            "hit_tokens": hit.tokens,
            "exact": hit.exact,
            "load_seconds": hit.load_seconds,
            "saved_seconds": hit.made_in - hit.load_seconds if hit.tokens else 0.0,
            "written_bytes": self._written,
            "save_seconds": self._save_seconds,
        }


def _now(where: Tensor) -> float:
    if where.is_cuda:
        torch.cuda.synchronize(where.device)
    return time.perf_counter()
