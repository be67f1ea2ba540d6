"""Queries, keys and values out of the products of attention modules."""

from typing import Any

import pytest
import torch
from model_families import FAMILIES
from torch import Tensor, nn

from spectralquant.calibration.products import measured_scale
from spectralquant.calibration.recording import recording


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_measured_scale(bias: float) -> None:
    """With and without ALiBi; what is hidden counts for nothing."""
    query, key = torch.randn(2, 3, 50, 32), torch.randn(2, 3, 200, 32)
    logits = 0.37 * query @ key.mT + bias * torch.arange(200)
    logits[..., -20:] = -torch.inf
    assert measured_scale(query, key, logits.softmax(-1)) == pytest.approx(0.37, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["BLOOM", "Falcon 40B", "Falcon-RW (ALiBi)", "GPT-Neo", "MPT"])
def test_states_are_those_that_the_cache_gets(name: str) -> None:
    """And the factor of the logits is the model's."""
    model, seen = next(f for f in FAMILIES if f.name == name).build(), []
    hooks = len(list(_hooks(model)))
    ids = torch.randint(3, 199, (2, 40))

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> None:
        seen.append((query, key, value, scale))

    with recording(model, look):
        out = model(ids, use_cache=True)
    cached = getattr(out, "cache", None) or out.past_key_values
    assert len(seen) == 2 and len(list(_hooks(model))) == hooks
    for (query, key, value, scale), layer in zip(seen, cached.layers, strict=True):
        assert query.shape == (2, 4, 40, 32) and scale == pytest.approx(1.0 if name == "GPT-Neo" else 32**-0.5, rel=1e-3)
        torch.testing.assert_close(key, layer.keys)
        torch.testing.assert_close(value, layer.values)


def _hooks(model: nn.Module) -> Any:
    for module in model.modules():
        yield from (*module._forward_pre_hooks, *module._forward_hooks)
