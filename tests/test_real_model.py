"""SmolLM2-135M-Instruct: the quality that the package is for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spectralquant import SpectralQuantEngine, get_default_calibration_texts

pytestmark = pytest.mark.real


@torch.no_grad()
@pytest.mark.parametrize(("preset", "bound"), [("standard", 0.03), ("high", 0.03), ("max", 0.05), ("ultra", 0.08)])
def test_divergence(smollm2: tuple[Any, Any], smollm2_calibration: Path, preset: str, bound: float) -> None:
    """Mean KL to the uncompressed model on text outside the calibration, scored in chunks that read codes. The bound allows for the
    test's small calibration; benchmarks/ has the real figures."""
    model, tokenizer = smollm2
    engine = SpectralQuantEngine(compression=preset)
    engine.load_calibration(smollm2_calibration)
    text = "\n\n".join(t for i, t in enumerate(get_default_calibration_texts()) if i in (6, 20, 61))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :640]
    want = model(ids).logits[0, 512:].log_softmax(-1)
    with engine.applied_to(model):
        cache = engine.cache(model)
        model(ids[:, :512], past_key_values=cache)
        got = torch.cat([model(c, past_key_values=cache).logits[0] for c in ids[:, 512:].split(16, 1)]).log_softmax(-1)
    assert (want.exp() * (want - got)).sum(-1).mean() < bound
    assert (want.argmax(-1) == got.argmax(-1)).float().mean() > 0.88


@torch.no_grad()
def test_ratio_is_real_bytes(smollm2: tuple[Any, Any], smollm2_calibration: Path) -> None:
    """At 2,048 tokens the whole cache, a window of 256 tokens and slack included, is at least 3.6 times smaller."""
    model, _ = smollm2
    engine = SpectralQuantEngine()
    engine.load_calibration(smollm2_calibration)
    with engine.applied_to(model):
        cache = engine.cache(model)
        model.base_model(torch.randint(3, 49_000, (1, 2048)), past_key_values=cache)
    assert cache.dense_bytes == 30 * 2 * 3 * 2048 * 64 * 2
    assert cache.dense_bytes / cache.nbytes > 3.6


def test_generate_chat(smollm2: tuple[Any, Any], smollm2_calibration: Path) -> None:
    model, tokenizer = smollm2
    engine = SpectralQuantEngine()
    engine.load_calibration(smollm2_calibration)
    out = engine.generate(model, tokenizer, [{"role": "user", "content": "What is the capital of France?"}], 12, do_sample=False)
    assert "Paris" in out["text"]
