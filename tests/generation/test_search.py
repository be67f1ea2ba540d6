"""Ways to choose tokens: beams, samples, penalties, constraints, rollbacks."""

from typing import Any

import pytest
import torch
from near_lossless import NEAR, Pair, packed_tokens, relative, tokens
from releases import has_window, needs_windows_that_go_back, skip_before
from tiny_models import tiny_model
from transformers import LogitsProcessor, MaxTimeCriteria, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

SAMPLING: dict[str, dict[str, Any]] = {
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_k": 0, "top_p": 0.8, "temperature": 1.3},
    "min-p": {"do_sample": True, "top_k": 0, "min_p": 0.05},
    "typical-p": {"do_sample": True, "top_k": 0, "typical_p": 0.7},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5},
    "chunks": {"prefill_chunk_size": 90},
    "forced": {"forced_eos_token_id": 2, "suppress_tokens": [5, 6, 7], "bad_words_ids": [[8], [9, 10]]},
}
BEAMS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.7, "early_stopping": True},
    "beam samples": {"num_beams": 3, "do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("options", [*SAMPLING.values(), *BEAMS.values()], ids=[*SAMPLING, *BEAMS])
def test_before_anything_is_coded(pair: Pair, options: dict[str, Any]) -> None:
    prompt, found = tokens(60, batch=2), []
    for cache in (pair.dense(), pair.cache()):
        torch.manual_seed(1)
        found.append(pair.generate(prompt, cache, max_new_tokens=20, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_sampling_sees_the_right_logits(pair: Pair, options: dict[str, Any]) -> None:
    """Logits along the chosen tokens, two blocks and more behind the first that is coded."""
    if "prefill_chunk_size" in options and has_window(pair):
        skip_before("5.3", "masks chunks behind a sliding window wrongly", since="5.0")
    prompt, cache = tokens(500, batch=2), pair.cache()
    out = pair.generate(prompt, cache, max_new_tokens=24, output_logits=True, return_dict_in_generate=True, **options)
    assert packed_tokens(cache) >= 384
    assert relative(torch.stack(out.logits, 1), pair.logits(out.sequences, 500)) < NEAR


@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS)
def test_beams_have_the_scores_of_their_tokens(pair: Pair, options: dict[str, Any]) -> None:
    """Beams change places at every step, blocks leave the window meanwhile: one row out of place gives scores of other tokens."""
    prompt, cache = tokens(505, batch=2), pair.cache(window=4)
    options = {"max_new_tokens": 40, "output_scores": True, "return_dict_in_generate": True, **options, "length_penalty": 1.0}
    out = pair.generate(prompt, cache, **options)
    chosen = pair.logits(out.sequences, 505).log_softmax(-1).gather(-1, out.sequences[:, 505:, None])[..., 0]
    if not options.get("do_sample"):  # scores of samples are those after warping
        torch.testing.assert_close(out.sequences_scores, chosen.mean(-1), rtol=0, atol=0.05)
        best = pair.generate(prompt, None, **options).sequences_scores
        torch.testing.assert_close(out.sequences_scores, best, rtol=0, atol=0.05)
    assert packed_tokens(cache) == 512


def test_group_beams(pair: Pair) -> None:
    """In transformers up to 4.56; later they are code from the hub."""
    prompt, options = tokens(400), {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}
    try:
        want = pair.generate(prompt, None, **options)
    except (ValueError, ImportError) as error:
        pytest.skip(f"this transformers has no group beam search of its own: {error}")
    assert (pair.generate(prompt, pair.cache(), **options) == want).float().mean() > 0.95


class OnlyEven(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(-1, torch.arange(1, scores.shape[-1], 2), -torch.inf)


def test_constrained_logits(pair: Pair) -> None:
    prompt = tokens(600)
    out = pair.generate(prompt, pair.cache(), logits_processor=[OnlyEven()], max_new_tokens=20)
    assert (out[0, 600:] % 2 == 0).all()
    allowed = pair.generate(prompt, pair.cache(), prefix_allowed_tokens_fn=lambda batch, ids: [11, 12, 13], max_new_tokens=20)
    assert set(allowed[0, 600:].tolist()) <= {11, 12, 13}


class UntilToken(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


class Tokens:
    """Enough of a tokenizer for stop strings: token 17 is written "<17>", the first ones are letters."""

    def __init__(self) -> None:
        self.texts = [*"abcdefgh", *(f"<{i}>" for i in range(8, 199))]
        self.vocabulary = {text: i for i, text in enumerate(self.texts)}

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def __call__(self, text: Any, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.vocabulary[letter] for letter in text]}

    def _convert_id_to_token(self, token: int) -> str:
        return self.texts[token]

    convert_ids_to_tokens = _convert_id_to_token


def test_stopping(llama_pair: Pair) -> None:
    """By a criterion, a stop string and the clock; the sequence goes on afterwards."""
    prompt, cache = tokens(600), llama_pair.cache()
    free = llama_pair.generate(prompt, llama_pair.cache(), max_new_tokens=30)
    last = int(free[0, 610])
    length = 601 + free[0, 600:].tolist().index(last)
    stopped = llama_pair.generate(prompt, cache, max_new_tokens=30, stopping_criteria=[UntilToken(last)])
    assert torch.equal(stopped, free[:, :length])
    assert torch.equal(llama_pair.generate(stopped, cache, max_new_tokens=630 - length), free)
    assert llama_pair.generate(prompt, llama_pair.cache(), stopping_criteria=[MaxTimeCriteria(0.0)]).shape[1] == 601


def test_stop_strings(llama_pair: Pair) -> None:
    prompt = tokens(600)
    free = llama_pair.generate(prompt, llama_pair.cache(), max_new_tokens=30)
    last = int(free[0, 610])
    length = 601 + free[0, 600:].tolist().index(last)
    names = Tokens()
    out = llama_pair.generate(prompt, llama_pair.cache(), max_new_tokens=30, stop_strings=[names.texts[last]], tokenizer=names)
    assert torch.equal(out, free[:, :length])


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamer(pair: Pair) -> None:
    prompt, streamer = tokens(400), Collected()
    out = pair.generate(prompt, pair.cache(), streamer=streamer)
    assert streamer.ended and streamer.tokens == out[0].tolist()


def repeating(length: int) -> torch.Tensor:
    """A text that prompt lookup finds continuations in."""
    return tokens(37).repeat(1, length // 37 + 1)[:, :length]


@pytest.mark.parametrize("window", [1, 128])
@pytest.mark.parametrize("length", [500, 508])
def test_prompt_lookup(pair: Pair, length: int, window: int) -> None:
    """Candidates are refused on both sides of a block border."""
    needs_windows_that_go_back(pair)
    prompt, cache = repeating(length), pair.cache(window=window)
    out = pair.generate(prompt, cache, prompt_lookup_num_tokens=9, max_new_tokens=40)
    pair.require_greedy(out, length)
    assert cache.get_seq_length() >= length + 39


def assistant_of(pair: Pair) -> PreTrainedModel:
    """The model with a little noise: it is right most of the time."""
    family = {"llama": "llama", "qwen2": "qwen2", "gemma2": "gemma2"}[pair.model.config.model_type]
    assistant = tiny_model(family)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter)) if parameter.dim() > 1 else None
    return assistant


@pytest.mark.parametrize("window", [1, 128])
def test_assisted(pair: Pair, window: int) -> None:
    needs_windows_that_go_back(pair)
    if has_window(pair):
        skip_before("5.18", "masks an assistant's sliding window wrongly after refusals", since="5.16")
    prompt, assistant = tokens(500), assistant_of(pair)
    out = pair.generate(prompt, pair.cache(window=window), assistant_model=assistant, max_new_tokens=40)
    pair.require_greedy(out, 500)


@pytest.mark.parametrize("window", [1, 128])
@pytest.mark.parametrize("length", [499, 511, 513, 640])
@pytest.mark.parametrize("count", [1, 14, 128])
def test_refused_candidates_leave_no_trace(llama_pair: Pair, length: int, count: int, window: int) -> None:
    """After rollbacks over a block border a layer is bit for bit the one that never saw the candidates: prompt with candidates, one accepted, more refused."""
    layer, plain = (llama_pair.cache(window=window).coded_layers[0] for _ in range(2))
    layer.activate_past_recording()
    kv = torch.randn(2, 1, 2, length + 140, 32)
    refused = torch.randn(2, 1, 2, count, 32)
    plain.update(*kv[..., :length, :])
    layer.update(*torch.cat([kv[..., :length, :], refused], -2))
    layer.crop(-count)
    for at in range(length, length + 140):
        plain.update(*kv[..., at : at + 1, :])
        layer.update(*torch.cat([kv[..., at : at + 1, :], refused[..., 1:, :]], -2))
        layer.crop(1 - count)
    a, b = layer.segment, plain.segment
    assert (a.packed, a.recent) == (b.packed, b.recent) and torch.equal(a.lengths, b.lengths)
    units = a.packed // 128
    assert torch.equal(a.records[:, :, :units], b.records[:, :, :units])
    assert torch.equal(a.recent_keys[:, :, : a.recent], b.recent_keys[:, :, : b.recent])
    used = int((b.exact_slots >= 0).sum())
    assert torch.equal(a.exact_slots[:, :used], b.exact_slots[:, :used]) and int((a.exact_slots >= 0).sum()) == used
