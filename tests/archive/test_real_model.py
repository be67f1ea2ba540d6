"""SmolLM2-135M-Instruct: what archives are for, on little text; benchmarks/archive.py has the real figures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spectralquant import get_default_calibration_texts
from spectralquant.archive.codec import decode_dense, encode_dense
from spectralquant.archive.predictor import Moments, fit_archive
from spectralquant.evaluation.tasks.base import continue_with, hand_over, read_context
from spectralquant.profile import load_profile

pytestmark = pytest.mark.real
CONTEXT, SCORED = 512, 64


@torch.no_grad()
def test_twelve_times_smaller_and_close(smollm2: tuple[Any, Any], smollm2_calibration: Path) -> None:
    """Fitted on 3,000 tokens, without sensitivities; the bounds allow for that."""
    model, tokenizer = smollm2
    profile = load_profile(smollm2_calibration)
    texts = get_default_calibration_texts()
    scored = (6, 20, 61)
    moments = Moments(profile, depth=1)
    corpus = tokenizer("\n\n".join(t[:1200] for i, t in enumerate(texts) if i not in scored), return_tensors="pt")["input_ids"][:, :3000]
    for sample in corpus.split(1000, 1):
        context = read_context(model, sample)
        moments.add({i: (context[i][0][0], context[i][1][0]) for i in profile.layers})
    archive = fit_archive(profile, moments)
    ids = tokenizer("\n\n".join(texts[i] for i in scored), return_tensors="pt")["input_ids"][:, : CONTEXT + SCORED]
    context = read_context(model, ids[:, :CONTEXT])
    want = continue_with(model, hand_over(context, DynamicCache()), ids[:, CONTEXT:], SCORED).log_softmax(-1)
    payload = encode_dense(archive, {i: (context[i][0][0], context[i][1][0]) for i in profile.layers}, rate=2)
    decoded = [(keys[None], values[None]) for _, keys, values in decode_dense(archive, payload, CONTEXT)]
    got = continue_with(model, hand_over(decoded, DynamicCache()), ids[:, CONTEXT:], SCORED).log_softmax(-1)
    ratio, kl = 30 * 2 * 3 * 64 * CONTEXT * 2 / len(payload), float((want.exp() * (want - got)).sum(-1).mean())
    assert ratio > 11, (ratio, kl)
    assert kl < 0.05, (ratio, kl)
