"""One cache over several calls: chats, copies, rows that move, saving, and what a failed call leaves."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from near_lossless import NEAR, Pair, packed_tokens, relative, tokens
from releases import needs_windows_that_go_back
from tiny_models import TinyTokenizer, tiny_model
from transformers import GenerationConfig, StoppingCriteria

from spectralquant.cache.hf import SpectralCache
from spectralquant.compat import ASSISTED_READS_ALL, PIECES_READ_ALL, UNCROPPABLE
from spectralquant.errors import ConfigError, ShapeError


def test_chat_continues_one_cache(pair: Pair) -> None:
    """Turns of several blocks; every answer is the uncompressed model's."""
    text, cache = tokens(30), pair.cache()
    for question in (300, 200, 5, 260):
        text = torch.cat([text, tokens(question)], 1)
        width = text.shape[1]
        text = pair.generate(text, cache, max_new_tokens=25)
        pair.require_greedy(text, width)
        assert cache.get_seq_length() == text.shape[1] - 1
    assert packed_tokens(cache) >= 512


def test_chat_of_a_padded_batch(pair: Pair) -> None:
    ids, mask, cache = tokens(90, batch=3), torch.ones(3, 90, dtype=torch.long), pair.cache()
    mask[0, :70], mask[2, :5] = 0, 0
    for question in (0, 300, 170):
        ids, mask = torch.cat([ids, tokens(question, 3)], 1), torch.cat([mask, mask.new_ones(3, question)], 1)
        width = ids.shape[1]
        ids = pair.generate(ids, cache, attention_mask=mask, max_new_tokens=10)
        pair.require_greedy(ids, width, mask)
        mask = torch.cat([mask, mask.new_ones(3, 10)], 1)


@torch.no_grad()
def test_rows_move(pair: Pair) -> None:
    """As custom loops move them: every row goes on as the text it came from."""
    prompt, more = tokens(600, batch=3), tokens(1).expand(3, -1)
    cache = pair.cache()
    pair.forward(prompt, cache)
    want = pair.forward(more, copy.deepcopy(cache))
    moves: dict[Callable[[SpectralCache], Any], list[int]] = {
        lambda c: c.reorder_cache(torch.tensor([2, 0, 0])): [2, 0, 0],
        lambda c: c.batch_select_indices(torch.tensor([1])): [1],
        lambda c: c.batch_repeat_interleave(2): [0, 0, 1, 1, 2, 2],
    }
    for move, rows in moves.items():
        other = cache.copy()
        move(other)
        assert relative(pair.forward(more[:1].expand(len(rows), -1), other), want[rows]) < 1e-4
    assert relative(pair.forward(more, cache), want) == 0, "copies share nothing that is written"


@torch.no_grad()
def test_crop_and_go_on(llama_pair: Pair) -> None:
    """A custom loop that takes an answer back: to the window, to a block border, and into a block."""
    prompt, more = tokens(900), tokens(9)
    for length in (899, 640, 500, 3, 1):
        cache = llama_pair.cache()
        llama_pair.forward(prompt, cache)
        cache.crop(length - 900)
        assert cache.get_seq_length() == length
        want = llama_pair.model(torch.cat([prompt[:, :length], more], 1)).logits[:, length:]
        assert relative(llama_pair.forward(more, cache), want) < NEAR


@torch.no_grad()
@pytest.mark.parametrize("how", ["copy", "deepcopy", "file"])
def test_state_between_turns(pair: Pair, how: str, tmp_path: Path) -> None:
    """Copied, by the recipe of transformers' documentation, or saved to a file."""
    prompt, more, cache = tokens(600), tokens(4), pair.cache()
    pair.forward(prompt, cache)
    if how == "file":
        torch.save(cache, tmp_path / "cache.pt")
        kept = torch.load(tmp_path / "cache.pt", weights_only=False)
    else:
        kept = cache.copy() if how == "copy" else copy.deepcopy(cache)
        assert kept.codec_bytes == cache.codec_bytes and kept.coded_layers[0].codec is cache.coded_layers[0].codec
    want = pair.forward(more, cache)
    pair.forward(tokens(400), cache)
    assert torch.equal(pair.forward(more, kept), want)


def require_turns(pair: Pair, options: dict[str, Any]) -> None:
    """Three turns on one cache: each answer is the model's own, and the cache holds the text but its last token."""
    cache, text = pair.cache(), tokens(200)
    for question in (0, 90, 120):
        text = torch.cat([text, tokens(question)], 1)
        width = text.shape[1]
        text = pair.generate(text, cache, **options)
        pair.require_greedy(text, width)
        assert cache.get_seq_length() == text.shape[1] - 1


@pytest.mark.parametrize("how", ["prompt lookup", "assistant", "configuration"])
def test_assisted_turns(llama_pair: Pair, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Releases that put the whole text behind the cache's first answer gave other tokens than the model, and a cache with more tokens than the text."""
    options: dict[str, Any] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "assistant": {"assistant_model": tiny_model("llama", seed=3)},
        "configuration": {"generation_config": GenerationConfig(prompt_lookup_num_tokens=4)},
    }[how]
    require_turns(llama_pair, options)
    assert ("read anew" in caplog.text) == ASSISTED_READS_ALL


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 50}, {"generation_config": GenerationConfig(prefill_chunk_size=50)}], ids=["option", "configuration"]
)
def test_turns_in_pieces(llama_pair: Pair, options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Releases that begin the pieces with the text that the cache holds gave other tokens than the model."""
    require_turns(llama_pair, options)
    assert ("read at once" in caplog.text) == PIECES_READ_ALL


def test_prefix_with_the_whole_text_alone(pair: Pair) -> None:
    """Also where a window has slid over its beginning and can't go back."""
    prompt = tokens(600)
    held = pair.engine.compress_prefill(pair.model, TinyTokenizer(), prompt)
    out = pair.generate(prompt, held["cache"], max_new_tokens=3)
    assert int(out[0, 600]) == held["next_token"] and held["cache"].get_seq_length() == 600


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_prefix_with_beams_and_samples(pair: Pair, options: dict[str, Any]) -> None:
    """transformers makes several rows of one; the prefix has to follow."""
    if "prompt_lookup_num_tokens" in options:
        needs_windows_that_go_back(pair)
    held = pair.engine.compress_prefill(pair.model, TinyTokenizer(), tokens(600))["cache"]
    question = tokens(6)
    out = pair.generate(question, held, **options)
    assert len(out) == options.get("num_return_sequences", 1) and (out[:, :6] == question).all()
    if "prompt_lookup_num_tokens" in options:
        whole = torch.cat([held.prefix_ids, out], 1)
        pair.require_greedy(whole, 606)
    assert pair.generate(question, held, num_beams=1).shape == (1, 18)


class BrokenLayerError(Exception):
    pass


def fail_in_layer(pair: Pair, index: int, calls: int) -> Any:
    """Let a layer's output projection fail at its `calls`th call."""
    left = [calls]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise BrokenLayerError

    return pair.model.model.layers[index].self_attn.o_proj.register_forward_hook(hook)


@pytest.mark.parametrize("calls", [1, 30])
@pytest.mark.parametrize("held", [0, 300])
def test_generate_that_fails_leaves_the_cache_as_it_was(llama_pair: Pair, calls: int, held: int) -> None:
    """An exception in the middle of a pass, in the prefill and later: the same call works afterwards."""
    prompt, cache = tokens(620), llama_pair.cache()
    if held:
        with torch.no_grad():
            llama_pair.forward(prompt[:, :held], cache)
    handle = fail_in_layer(llama_pair, 1, calls)
    try:
        with pytest.raises(BrokenLayerError):
            llama_pair.generate(prompt, cache, max_new_tokens=60)
    finally:
        handle.remove()
    assert {layer.get_seq_length() for layer in cache.layers} == {held}
    llama_pair.require_greedy(llama_pair.generate(prompt, cache, max_new_tokens=20), 620)


def test_interrupted_where_a_window_has_slid(gemma2_pair: Pair) -> None:
    """Sliding layers can't go back: the cache starts anew, and the next call reads the whole text."""

    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            raise KeyboardInterrupt

    cache = gemma2_pair.cache()
    text = gemma2_pair.generate(tokens(400), cache)
    with pytest.raises(KeyboardInterrupt):
        gemma2_pair.generate(text, cache, stopping_criteria=[Interrupt()])
    assert cache.get_seq_length() == 0
    gemma2_pair.require_greedy(gemma2_pair.generate(text, cache), text.shape[1])


@torch.no_grad()
def test_crop_that_a_window_refuses_changes_nothing(gemma2_pair: Pair) -> None:
    """A window that has slid on can't be cropped; layers before it would have lost their tokens by then."""
    prompt, more, cache = tokens(400), tokens(3), gemma2_pair.cache()
    gemma2_pair.forward(prompt, cache)
    want = gemma2_pair.forward(more, cache.copy())
    cache.layers.reverse()  # coded layers first
    with pytest.raises(UNCROPPABLE):
        cache.crop(-300)
    cache.layers.reverse()
    assert {layer.get_seq_length() for layer in cache.layers} == {400} and torch.equal(gemma2_pair.forward(more, cache), want)


@torch.no_grad()
def test_forward_that_failed_is_noticed(llama_pair: Pair) -> None:
    """Outside of generate nobody can take the tokens back: going on says what to do."""
    prompt, cache = tokens(600), llama_pair.cache()
    llama_pair.forward(prompt, cache)
    handle = fail_in_layer(llama_pair, 1, 1)
    with pytest.raises(BrokenLayerError):
        llama_pair.forward(tokens(1), cache)
    handle.remove()
    with pytest.raises(ConfigError, match="interrupted"):
        llama_pair.forward(tokens(1), cache)
    cache.roll_back(600)
    more = tokens(3)
    assert relative(llama_pair.forward(more, cache), llama_pair.model(torch.cat([prompt, more], 1)).logits[:, 600:]) < NEAR


@torch.no_grad()
def test_update_that_fails_stores_nothing(llama_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory between two tiles of a long prompt."""
    cache, plain = (llama_pair.cache(tile_tokens=256) for _ in range(2))
    prompt, more = tokens(400), tokens(1200)
    for one in (cache, plain):
        llama_pair.forward(prompt, one)
    segment = cache.coded_layers[0].segment
    pack, left = type(segment)._pack, [2]

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("no memory")
        pack(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(segment), "_pack", failing)
        with pytest.raises(torch.OutOfMemoryError):
            llama_pair.forward(more, cache)
    assert torch.equal(llama_pair.forward(more, cache), llama_pair.forward(more, plain))
    assert torch.equal(segment.exact_slots[segment.exact_slots >= 0], (s := plain.coded_layers[0].segment.exact_slots)[s >= 0])


@torch.no_grad()
def test_other_batches_are_refused(pair: Pair) -> None:
    """One sequence would otherwise be written to all rows, without a word."""
    cache, more = pair.cache(), tokens(1, batch=3)
    pair.forward(tokens(400, batch=2), cache)
    for batch in (more, more[:1]):
        with pytest.raises(ShapeError, match="holds 2"):
            pair.forward(batch, cache.copy())
    told = pair.cache()
    with pytest.raises(ConfigError, match="2 sequences"):
        told.set_padding(torch.ones(2, 30))
        pair.forward(tokens(30, batch=3), told)


@torch.no_grad()
def test_caches_of_other_models_are_refused(llama_pair: Pair) -> None:
    cache = llama_pair.engine.cache(llama_pair.model)
    other = tiny_model("llama", seed=8)
    with llama_pair.engine.applied_to(other), pytest.raises(ConfigError, match="another model"):
        other.generate(tokens(20), past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ShapeError, match="1 heads of size 32"):
        Pair.forward(Pair(tiny_model("qwen2"), llama_pair.engine), tokens(20), cache)
    deeper = copy.deepcopy(other.config)
    deeper.num_hidden_layers = 4
    deeper.layer_types = None
    with pytest.raises(ShapeError, match="layer 3"):
        Pair.forward(Pair(type(other)(deeper).eval(), llama_pair.engine), tokens(20), llama_pair.cache())
