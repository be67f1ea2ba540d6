"""Where the time of one generation goes: prefill, packing, decoding."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from spectralquant.cache.hf import SpectralCache
from spectralquant.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class GenerationTimes:
    """Seconds of one generation. `first_token`: until the first logits of the prompt were there; it includes the packing of the prompt."""

    seconds: float
    first_token: float
    prompt_packing: float
    packing: float

    def stats(self, later_tokens: int) -> dict[str, float]:
        """As `SpectralQuantEngine.generate` tells them; `later_tokens`: all but the first of every row."""
        decode = self.seconds - self.first_token
        return {
            "prefill_seconds": self.first_token - self.prompt_packing,
            "compress_seconds": self.packing,
            "decode_seconds": decode - (self.packing - self.prompt_packing),
            "time_to_first_token": self.first_token,
            "decode_tokens_per_second": later_tokens / decode if decode > 0 and later_tokens > 0 else 0.0,
        }


class GenerationClock:
    """Runs from its making to `stop`. The first logits that transformers has for a row are the end of the prefill, so the clock looks on as a logits processor.

    Args:
        cache: Empty; its packing is watched.
        device: Of the model.
    """

    def __init__(self, cache: SpectralCache, device: torch.device) -> None:
        self._device, self._first, self._prompt_packing = device, None, 0.0
        self._packing = Stopwatch(device)
        for layer in cache.coded_layers:
            layer.watch = self._packing
        self._began = self._now()

    def watched(self, generation: dict[str, Any]) -> dict[str, Any]:
        """Options of `generate` with the clock in them, behind the caller's own processors."""
        return {**generation, "logits_processor": LogitsProcessorList([*(generation.get("logits_processor") or ()), _Look(self)])}

    def stop(self) -> GenerationTimes:
        self.look()
        assert self._first is not None
        return GenerationTimes(self._now() - self._began, self._first, self._prompt_packing, self._packing.seconds())

    def look(self) -> None:
        """Called at every token; the first call counts."""
        if self._first is None:
            self._first = self._now() - self._began
            self._prompt_packing = self._packing.seconds()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Look(LogitsProcessor):
    """Changes nothing."""

    def __init__(self, clock: GenerationClock) -> None:
        self._clock = clock

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._clock.look()
        return scores
