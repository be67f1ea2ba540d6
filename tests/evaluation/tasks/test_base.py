"""The shared steps change nothing: with the plain cache they give what the model gives by itself."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import DynamicCache, PreTrainedModel

from spectralquant.evaluation.tasks import find_task
from spectralquant.evaluation.tasks.base import continue_with, generate_greedily, hand_over, read_context

FLOAT = {"rtol": 1e-4, "atol": 1e-4}
"""Sums in another order, in float32, through three layers."""


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 199, (batch, length))


@torch.no_grad()
def test_read_context_is_what_the_model_stores(llama: PreTrainedModel) -> None:
    prompt, cache = ids(70, batch=2), DynamicCache()
    llama(prompt, past_key_values=cache)
    context = read_context(llama, prompt)
    assert len(context) == len(cache.layers) == 3
    for (keys, values), layer in zip(context, cache.layers, strict=True):
        assert keys.shape == values.shape == (2, 2, 70, 32)
        torch.testing.assert_close(keys, layer.keys)
        torch.testing.assert_close(values, layer.values)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-sliding"])
def test_continue_with_equals_one_forward(family: str, chunk: int) -> None:
    """Sliding layers too, with a context far longer than their window of 64."""
    model = tiny_model(family)
    text = ids(200)
    cache = hand_over(read_context(model, text[:, :160]), DynamicCache(config=model.config))
    got = continue_with(model, cache, text[:, 160:], chunk)
    assert got.dtype == torch.float32 and cache.get_seq_length() == 200
    torch.testing.assert_close(got, model(text).logits[0, 160:], **FLOAT)


def test_hand_over_leaves_the_context_to_the_next_cache(llama: PreTrainedModel) -> None:
    """Every method starts from the same numbers, whatever the one before it did to its cache."""
    context = read_context(llama, ids(40))
    before = [(k.clone(), v.clone()) for k, v in context]
    cache = hand_over(context, DynamicCache())
    continue_with(llama, cache, ids(20), 4)
    for layer in cache.layers:
        layer.keys.zero_()
    assert all(torch.equal(a, b) for new, old in zip(context, before, strict=True) for a, b in zip(new, old, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("split", [1, 30, 49])
def test_generate_greedily_equals_generate(talkative: PreTrainedModel, split: int) -> None:
    prompt = ids(50)
    want = talkative.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 50:].tolist()
    cache = hand_over(read_context(talkative, prompt[:, :split]), DynamicCache())
    assert generate_greedily(talkative, cache, prompt[:, split:], 16, 20, lambda tokens: False) == want


def test_generate_greedily_stops_early(talkative: PreTrainedModel) -> None:
    prompt = ids(50)
    context = read_context(talkative, prompt[:, :40])
    whole = generate_greedily(talkative, hand_over(context, DynamicCache()), prompt[:, 40:], 16, 12, lambda tokens: False)
    seen: list[list[int]] = []

    def stop(tokens: list[int]) -> bool:
        seen.append(list(tokens))
        return len(tokens) == 5

    assert generate_greedily(talkative, hand_over(context, DynamicCache()), prompt[:, 40:], 16, 12, stop) == whole[:5]
    assert seen == [whole[: i + 1] for i in range(5)]


@pytest.mark.parametrize("name", ["language", "needles", "problems"])
def test_find_task_knows(name: str) -> None:
    assert find_task(name).name == name


def test_find_task_rejects_unknown() -> None:
    with pytest.raises(ValueError, match="task 'poems' is unknown: expected one of language, needles, problems"):
        find_task("poems")
