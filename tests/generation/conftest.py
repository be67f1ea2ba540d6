"""Three families with an engine each whose codes are nearly lossless, so that what a code costs can't hide what a mistake costs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tiny_models import TinyTokenizer, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant import SpectralQuantEngine
from spectralquant.cache.hf import SpectralCache
from spectralquant.config import CacheConfig
from spectralquant.corpus import get_default_calibration_texts

FAMILIES = ("llama", "qwen2", "gemma2")
NEAR = 0.03
"""Relative norm of the logits' error with 8-bit codes: the models are random with large weights, which amplify what a code changes."""


@dataclass(frozen=True)
class Pair:
    """A model, and an engine that holds its calibration with every coordinate at 8 bits, the widest that the packed format has."""

    model: PreTrainedModel
    engine: SpectralQuantEngine

    def cache(self, **config: Any) -> SpectralCache:
        """An empty cache. Without the mass of coded tokens, which is measured for the preset's codes and not for these."""
        self.engine.apply_to(self.model)
        codecs = {i: replace(codec, missing_mass=None) for i, codec in self.engine.profile_codec(self.model).items()}
        return SpectralCache(self.model.config, codecs, CacheConfig(**config))

    def generate(self, prompt: Tensor, cache: SpectralCache | None = None, **options: Any) -> Any:
        """`generate` with `cache`, None for the uncompressed one."""
        defaults = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        given = {} if cache is None else {"past_key_values": cache}
        return self.model.generate(prompt, **given, **{**defaults, **options})

    @torch.no_grad()
    def require_greedy(self, sequences: Tensor, prompt: Tensor, mask: Tensor | None = None) -> None:
        """Every new token is what the uncompressed model chooses after the ones before, or as good within what the codes cost."""
        mask = torch.ones_like(prompt) if mask is None else mask
        mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1])], 1)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        logits = self.model(sequences, attention_mask=mask, position_ids=position).logits[:, prompt.shape[1] - 1 : -1]
        new = sequences[:, prompt.shape[1] :]
        behind = logits.amax(-1) - logits.gather(-1, new[..., None])[..., 0]
        assert (behind <= 2 * NEAR * logits.norm(dim=-1) / logits.shape[-1] ** 0.5).all(), behind.max()


def near_lossless(model: PreTrainedModel) -> SpectralQuantEngine:
    engine = SpectralQuantEngine(None, 8, noise_bits=8, value_noise_bits=8, d_eff_variance=1.0, quantizer="uniform")
    engine.calibrate(model, TinyTokenizer(), get_default_calibration_texts(12), progress=False)
    return engine


@pytest.fixture(scope="session")
def _pairs() -> dict[str, Pair]:
    return {}


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, _pairs: dict[str, Pair]) -> Iterator[Pair]:
    yield from _borrow(request.param, _pairs)


@pytest.fixture
def llama_pair(_pairs: dict[str, Pair]) -> Iterator[Pair]:
    yield from _borrow("llama", _pairs)


def _borrow(family: str, pairs: dict[str, Pair]) -> Iterator[Pair]:
    if family not in pairs:
        model = tiny_model(family)
        pairs[family] = Pair(model, near_lossless(model))
    yield pairs[family]
    pairs[family].engine.remove_from(pairs[family].model)
