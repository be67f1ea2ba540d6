"""A model with an engine whose codes are nearly lossless, so that what a code costs can't hide what a mistake costs."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from tiny_models import TinyTokenizer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from spectralquant import SpectralQuantEngine
from spectralquant.cache.hf import SpectralCache
from spectralquant.compat import cache_argument
from spectralquant.config import CacheConfig
from spectralquant.corpus import get_default_calibration_texts

NO_END = 199
"""A token outside of the vocabulary that ends no text; some releases' prompt lookup takes no None."""
NEAR = 0.03
"""Relative norm of the logits' error with 8-bit codes: the models are random with large weights, which amplify what a code changes."""


def tokens(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 199, (batch, length))


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference, relative to `want`."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def packed_tokens(cache: SpectralCache) -> int:
    return cache.coded_layers[0].segment.packed


@dataclass(frozen=True)
class Pair:
    """A model, and an engine that holds its calibration with every coordinate at 8 bits, the widest that the packed format has."""

    model: PreTrainedModel
    engine: SpectralQuantEngine

    @staticmethod
    def of(model: PreTrainedModel) -> "Pair":
        engine = SpectralQuantEngine(None, 8, noise_bits=8, value_noise_bits=8, d_eff_variance=1.0, quantizer="uniform")
        engine.calibrate(model, TinyTokenizer(), get_default_calibration_texts(12), progress=False)
        return Pair(model, engine)

    def cache(self, **config: Any) -> SpectralCache:
        """An empty cache. Without the mass of coded tokens, which only our attention adds, and which is measured for the preset's codes; with exact tokens
        of 32 bits, so that nothing but codes makes a difference."""
        self.engine.apply_to(self.model)
        codecs = {i: replace(codec, missing_mass=None, exact_dtype=torch.float32) for i, codec in self.engine.profile_codec(self.model).items()}
        return SpectralCache(self.model.config, codecs, CacheConfig(**config))

    def dense(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def forward(self, ids: Tensor, cache: Any, **options: Any) -> Tensor:
        """Logits of `ids` after what `cache` holds."""
        return self.model(ids, use_cache=True, **cache_argument(self.model, cache), **options).logits

    def generate(self, prompt: Tensor, cache: SpectralCache | None = None, **options: Any) -> Any:
        """`generate` with `cache`, None for the uncompressed one."""
        defaults = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": NO_END, "pad_token_id": 0}
        given = {} if cache is None else {"past_key_values": cache}
        return self.model.generate(prompt, **given, **{**defaults, **options})

    @torch.no_grad()
    def logits(self, sequences: Tensor, width: int, mask: Tensor | None = None) -> Tensor:
        """What the uncompressed model gives for the tokens from `width` on, [B, T - width, vocabulary]; `mask` [B, width]: 0 for padding on the left."""
        mask = torch.ones_like(sequences[:, :width]) if mask is None else mask
        mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - width)], 1)
        return self.model(sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[:, width - 1 : -1]

    def require_greedy(self, sequences: Tensor, width: int, mask: Tensor | None = None) -> None:
        """Every token from `width` on is what the uncompressed model chooses after the ones before, or as good within what the codes cost."""
        logits = self.logits(sequences, width, mask)
        behind = logits.amax(-1) - logits.gather(-1, sequences[:, width:, None])[..., 0]
        within = 2 * NEAR * logits.square().mean(-1).sqrt()
        assert (behind <= within).all(), f"{behind.max():.3f} behind the best"
