"""Every family of encoders: with 8 bits its output is what it was, and afterwards the model is."""

import pytest
import torch
from encoders import FAMILIES, build, outputs

from spectralquant.integrations import EncoderEngine


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    inputs = FAMILIES[family][1]
    model, engine = build(family), EncoderEngine(bits=8)
    seen = engine.calibrate(model, [inputs() for _ in range(3)])
    batch = inputs()
    want = outputs(model, batch)
    with engine.applied_to(model):
        got = outputs(model, batch)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() / b.norm() < 1e-2
    assert seen["modules"] >= 2 and not torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, batch), want, strict=True))
