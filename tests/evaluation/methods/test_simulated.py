"""Caches that simulate: what is rounded when, against a list of tokens kept by hand."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from spectralquant.evaluation.methods import Subject
from spectralquant.evaluation.methods.simulated import Rule, SimulatedLayer, simulated


def to_whole(x: Tensor) -> Tensor:
    return x.round()


def to_tens(x: Tensor) -> Tensor:
    return (x / 10).round() * 10


RULES = {
    "plain": Rule(to_whole, to_tens),
    "blocks": Rule(to_whole, to_tens, key_block=8, value_block=4),
    "windows": Rule(to_whole, to_tens, key_window=5, value_window=3),
    "all": Rule(to_whole, to_tens, key_block=8, value_window=6, sinks=2),
}


def rounded_slots(length: int, block: int, window: int, sinks: int) -> set[int]:
    """Whole blocks after the sinks that lie before the window."""
    done = set()
    start = sinks
    while start + block <= length - window:
        done |= set(range(start, start + block))
        start += block
    return done


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("batch", [1, 3])
def test_layer_rounds_what_is_due_and_nothing_else(name: str, batch: int) -> None:
    rule, layer = RULES[name], SimulatedLayer(RULES[name])
    stored = [torch.empty(batch, 2, 0, 4), torch.empty(batch, 2, 0, 4)]
    for i, count in enumerate((21, 1, 7, 1, 16, 2)):
        new = [torch.randn(batch, 2, count, 4) * 20, torch.randn(batch, 2, count, 4) * 20]
        before = [t.clone() for t in new]
        read = layer.update(*new)
        stored = [torch.cat(pair, 2) for pair in zip(stored, before, strict=True)]
        length = stored[0].shape[2]
        wanted = [t.clone() for t in stored]
        for t, rounding, block, window in ((0, rule.key, rule.key_block, rule.key_window), (1, rule.value, rule.value_block, rule.value_window)):
            for slot in rounded_slots(length, block, window, rule.sinks):
                wanted[t][:, :, slot] = rounding(stored[t][:, :, slot])
        assert all(torch.equal(a, b) for a, b in zip(new, before, strict=True))  # the model's own tensors are not touched
        assert all(torch.equal(a, b) for a, b in zip(read, stored if i == 0 else wanted, strict=True))  # the prompt is read as it came
        assert torch.equal(layer.keys, wanted[0]) and torch.equal(layer.values, wanted[1])  # pyright: ignore
    assert layer.get_seq_length() == 48


def test_a_token_is_rounded_once() -> None:
    """A rounding that is not idempotent shows it."""
    layer = SimulatedLayer(Rule(lambda x: x + 1, lambda x: x + 1, key_window=2, value_block=2))
    for count in (3, 1, 1, 4):
        layer.update(torch.zeros(1, 1, count, 2), torch.zeros(1, 1, count, 2))
    assert layer.keys[0, 0, :, 0].tolist() == [1] * 7 + [0] * 2  # pyright: ignore
    assert layer.values[0, 0, :, 0].tolist() == [1] * 8 + [0]  # pyright: ignore


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("length", [1, 3, 50])
def test_exact_tokens_are_those_not_rounded(name: str, length: int, tmp_path: Path) -> None:
    rule, model = RULES[name], tiny_model()
    method = simulated("name", "label", "family", lambda subject: lambda layer: rule, lambda dim: dim / 10).prepare(Subject(model, None, tmp_path))
    cache = method.cache()
    for layer in range(3):
        cache.update(torch.randn(1, 2, length, 32), torch.randn(1, 2, length, 32), layer)
    kept = [
        length - len(rounded_slots(length, block, window, rule.sinks))
        for block, window in ((rule.key_block, rule.key_window), (rule.value_block, rule.value_window))
    ]
    assert abs(method.exact(cache) - sum(kept) / 2) <= 0.5
    assert method.bits(cache) == 3.2


def test_sliding_layers_stay_as_they_are(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    cache = simulated("n", "l", "f", lambda subject: lambda layer: RULES["plain"], lambda dim: 1.0).prepare(Subject(model, None, tmp_path)).cache()
    kinds = [type(layer) for layer in cache.layers]
    assert set(kinds) == {DynamicSlidingWindowLayer, SimulatedLayer}
    assert [k is DynamicSlidingWindowLayer for k in kinds] == [t == "sliding_attention" for t in model.config.layer_types]  # pyright: ignore


def test_rules_differ_by_layer(tmp_path: Path) -> None:
    method = simulated("n", "l", "f", lambda subject: lambda layer: Rule(lambda x: x * layer, to_whole), lambda dim: 1.0)
    cache = method.prepare(Subject(tiny_model(), None, tmp_path)).cache()
    for layer in range(3):
        cache.update(torch.ones(1, 2, 4, 32), torch.ones(1, 2, 4, 32), layer)
    assert [float(layer.keys.mean()) for layer in cache.layers] == [0.0, 1.0, 2.0]  # pyright: ignore
