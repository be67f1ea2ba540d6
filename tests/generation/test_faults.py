"""Calls of `generate` that fail, at any step, by anybody's fault; and engines in threads and processes."""

import copy
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import workers
from faults import FailingOperations
from near_lossless import Pair, tokens
from tiny_models import TinyTokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from spectralquant import SpectralQuantEngine
from spectralquant.cache.hf import SpectralCache
from spectralquant.conversation import Conversation

STEPS = 8


class BrokenError(Exception):
    pass


class Broken:
    """Whatever it is called as, it raises at its n-th call."""

    def __init__(self, n: int, error: type[BaseException]) -> None:
        self.left, self.error = n, error

    def count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error("made up")


class BrokenStreamer(Broken, BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        self.count()

    def end(self) -> None:
        raise self.error("made up")


class BrokenProcessor(Broken, LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.count()
        return scores


class BrokenCriteria(Broken, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.count()
        return torch.zeros(len(input_ids), dtype=torch.bool)


HOOKS: dict[str, Callable[[int, type[BaseException]], dict[str, Any]]] = {
    "streamer": lambda n, error: {"streamer": BrokenStreamer(n, error)},
    "logits processor": lambda n, error: {"logits_processor": [BrokenProcessor(n, error)]},
    "stopping criterion": lambda n, error: {"stopping_criteria": [BrokenCriteria(n, error)]},
}


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_fail(llama_pair: Pair, hook: str, error: type[BaseException]) -> None:
    """At every step: a cache that was empty is empty, one that held tokens holds them, and the next call gives what it would have given."""
    prompt, more = tokens(290), tokens(5)
    held = llama_pair.cache()
    text = torch.cat([llama_pair.generate(prompt, held, max_new_tokens=3), more], 1)
    want = llama_pair.generate(text, held.copy(), max_new_tokens=STEPS)
    want_first = llama_pair.generate(prompt, llama_pair.cache(), max_new_tokens=STEPS)
    for n in range(0, STEPS, 2):
        empty, cache = llama_pair.cache(), held.copy()
        for given, one, result in ((prompt, empty, want_first), (text, cache, want)):
            before = one.get_seq_length()
            with pytest.raises(error):
                llama_pair.generate(given, one, max_new_tokens=STEPS, **HOOKS[hook](n, error))
            assert {layer.get_seq_length() for layer in one.layers} == {before}
            assert torch.equal(llama_pair.generate(given, one, max_new_tokens=STEPS), result)


@pytest.mark.parametrize("hook", HOOKS)
def test_engine_whose_generate_fails(engine: SpectralQuantEngine, hook: str) -> None:
    """The model is as it was, no thread is left, and the next call knows nothing of it."""
    model, prompt, threads = tiny_model("llama"), tokens(290)[0].tolist(), threading.active_count()
    want = workers.answer(model, engine, prompt)
    for n in (0, 3):
        with pytest.raises(BrokenError):
            engine.generate(model, TinyTokenizer(), prompt, STEPS, do_sample=False, **HOOKS[hook](n, BrokenError))
        assert not hasattr(model, "_spectralquant") and not {"generate", "forward"} & vars(model).keys()
        assert model.config._attn_implementation != "spectralquant" and threading.active_count() == threads
    assert workers.answer(model, engine, prompt) == want


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 100}], ids=str)
def test_generate_that_runs_out_of_memory(llama_pair: Pair, options: dict[str, Any]) -> None:
    """At operations all over the call. A cache that was empty is empty again, and the same call gives what it gives to a new one."""
    prompt, cache = tokens(300), llama_pair.cache()
    want = llama_pair.generate(prompt, llama_pair.cache(), max_new_tokens=4, **options)
    n, failed = 1, 0
    while True:
        try:
            with FailingOperations(n):
                llama_pair.generate(prompt, cache, max_new_tokens=4, **options)
            break
        except torch.OutOfMemoryError:
            failed += 1
        assert cache.get_seq_length() == 0
        n = n * 5 // 4 + 37
    assert failed > 5
    cache.reset()
    assert torch.equal(llama_pair.generate(prompt, cache, max_new_tokens=4, **options), want)


def test_follow_up_that_runs_out_of_memory(llama_pair: Pair) -> None:
    """The prefix serves the next one."""
    held = llama_pair.engine.compress_prefill(llama_pair.model, TinyTokenizer(), tokens(400))["cache"]
    question = tokens(6)
    want = llama_pair.generate(question, held, max_new_tokens=4)
    for n in (1, 20, 100, 400, 900):
        with pytest.raises(torch.OutOfMemoryError), FailingOperations(n):
            llama_pair.generate(question, held, max_new_tokens=4)
        assert held.get_seq_length() == 400 and held.prefix_ids is not None
        assert torch.equal(llama_pair.generate(question, held, max_new_tokens=4), want)


def test_conversation_that_runs_out_of_memory(engine: SpectralQuantEngine, model_folder: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    talk, calm = (Conversation(engine, model, tokenizer) for _ in range(2))
    for each in (talk, calm):
        each.reply("The hills of this country. " * 3, 4, do_sample=False)
    for n in (1, 30, 200, 700):
        with pytest.raises(torch.OutOfMemoryError), FailingOperations(n):
            talk.reply("never mind", 8, do_sample=False)
        assert talk.messages == calm.messages and talk.cache.get_seq_length() <= calm.cache.get_seq_length()
    assert talk.reply("go on", 6, do_sample=False)["text"] == calm.reply("go on", 6, do_sample=False)["text"]


def test_threads_with_models_of_their_own() -> None:
    """One engine for three models: answers are those that each gives alone, and every model is clean afterwards."""
    models, engine = [tiny_model(family) for family in ("llama", "qwen2", "qwen3")], SpectralQuantEngine()
    for model in models:
        engine.calibrate(model, TinyTokenizer(), progress=False, n_samples=4)
    jobs = [(model, tokens(200 + 40 * i)[0].tolist()) for i in range(3) for model in models]
    alone = [workers.answer(model, engine, prompt) for model, prompt in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda job: workers.answer(job[0], engine, job[1]), jobs)) == alone
    assert not any(hasattr(model, "_spectralquant") for model in models)


def test_threads_continue_copies_of_one_cache(llama_pair: Pair) -> None:
    """Each on its own copy, which share packed units."""
    prompt, cache = tokens(600), llama_pair.cache()
    text = llama_pair.generate(prompt, cache, max_new_tokens=3)
    texts = [torch.cat([text, tokens(9)], 1) for _ in range(6)]
    alone = [llama_pair.generate(each, cache.copy()) for each in texts]
    copies: list[SpectralCache] = [copy.deepcopy(cache) for _ in texts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(llama_pair.generate, texts, copies))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_pool_of_processes(method: str, engine: SpectralQuantEngine, llama: PreTrainedModel, model_folder: str, llama_calibration: Path) -> None:
    """Forked after the engine was used, or started anew with nothing but paths."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    prompts = [tokens(150 + 90 * i)[0].tolist() for i in range(4)]
    alone = [workers.answer(llama, engine, prompt) for prompt in prompts]
    workers.INHERITED[:] = [(llama, engine)]
    with multiprocessing.get_context(method).Pool(2, workers.one_thread) as pool:
        if method == "fork":
            got = pool.map_async(workers.answer_inherited, prompts)
        else:
            got = pool.starmap_async(workers.answer_from_files, [(model_folder, str(llama_calibration), prompt) for prompt in prompts])
        assert got.get(timeout=300) == alone
