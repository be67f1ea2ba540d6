"""A real server, asked by the client that people use."""

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import APIError, AsyncOpenAI, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import Server

from spectralquant.config import CacheConfig
from spectralquant.corpus import get_default_calibration_texts
from spectralquant.engine import SpectralQuantEngine

NEW_TOKENS = 16
LENGTHS = (20, 60, 127, 129, 200, 257, 300, 400, 513, 640, 900, 1100)
ARGUMENTS = ("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "32", "--max-num-batched-tokens", "2048")


@pytest.fixture(scope="module")
def server(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(smollm2_folder, tmp_path_factory.mktemp("log") / "server.log", *ARGUMENTS, packed={"preset": "high"}) as running:
        yield running


@pytest.fixture(scope="module")
def prompts(smollm2_folder: Path) -> list[list[int]]:
    """32 prompts of mixed lengths, none with a page in common."""
    ids = AutoTokenizer.from_pretrained(smollm2_folder)("\n".join(get_default_calibration_texts()[16:]))["input_ids"]
    starts = torch.linspace(0, len(ids) - 2000, 32).long().tolist()
    return [ids[start : start + LENGTHS[i % len(LENGTHS)]] for i, start in enumerate(starts)]


@dataclass(frozen=True)
class Answer:
    """Tokens, and log probabilities of the likeliest ones at every position."""

    tokens: list[int]
    likely: list[dict[int, float]]


def read_answer(choice: Any) -> Answer:
    token = lambda name: int(name.removeprefix("token_id:"))  # noqa: E731
    return Answer([token(name) for name in choice.logprobs.tokens], [{token(name): p for name, p in top.items()} for top in choice.logprobs.top_logprobs])


def request(prompt: list[int], **more: Any) -> dict[str, Any]:
    extra = {"return_tokens_as_token_ids": True}
    return {"model": "model", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0.0, "logprobs": 5, "extra_body": extra, **more}


async def ask_all(server: Server, prompts: list[list[int]]) -> list[Answer]:
    """All at once, every other one as a stream."""
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)

    async def ask(prompt: list[int], stream: bool) -> Answer:
        if not stream:
            return read_answer((await client.completions.create(**request(prompt))).choices[0])
        parts = [read_answer(part.choices[0]) async for part in await client.completions.create(**request(prompt), stream=True) if part.choices[0].logprobs]
        return Answer([t for p in parts for t in p.tokens], [t for p in parts for t in p.likely])

    return await asyncio.gather(*(ask(prompt, i % 2 == 0) for i, prompt in enumerate(prompts)))


def test_32_requests_at_once_say_what_generate_says(server: Server, prompts: list[list[int]], smollm2_folder: Path) -> None:
    """Greedy decoding in float32: the server's tokens, read by the model with a packed cache of transformers, are its own choice."""
    answers = asyncio.run(ask_all(server, prompts))
    engine = SpectralQuantEngine(cache_config=CacheConfig(sinks=1, max_exact_share=0.25))
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    engine.load_calibration(smollm2_folder / "spectralquant")
    same = off = 0.0
    with engine.applied_to(model), torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            assert len(answer.tokens) == NEW_TOKENS
            cache, ids = engine.cache(model), torch.tensor([prompt])
            for token, likely in zip(answer.tokens, answer.likely, strict=True):
                log_probability = model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].log_softmax(-1)
                same += int(log_probability.argmax()) == token
                off += sum(abs(float(log_probability[t]) - p) for t, p in likely.items()) / len(likely)
                ids = torch.tensor([[token]])
    count = NEW_TOKENS * len(prompts)
    assert same / count > 0.99 and off / count < 0.02, f"{same} of {count} tokens the same, log probabilities off by {off / count:.4f}"


def test_vllm_reports_a_capacity_of_5_5_times(server: Server) -> None:
    dense = 2**30 // (30 * 3 * 64 * 2 * 2)  # 1 GiB of bfloat16: layers, KV heads, head size, K and V, bytes
    assert server.capacity / dense >= 5.5


def test_a_hit_says_what_a_miss_says(server: Server, prompts: list[list[int]]) -> None:
    """Of prompts read in one piece the miss reads no codes and the hit does, so they say nearly the same; test_engine.py has the case of equal bits."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)
    long = [p[1:] for p in prompts if len(p) > 256][:6]
    misses = [read_answer(client.completions.create(**request(p)).choices[0]).tokens for p in long]
    before = server.metric("vllm:prefix_cache_hits_total")
    hits = [read_answer(client.completions.create(**request(p)).choices[0]).tokens for p in long]
    assert server.metric("vllm:prefix_cache_hits_total") - before >= sum((len(p) - 1) // 128 * 128 for p in long)
    assert sum(hit == miss for hit, miss in zip(hits, misses, strict=True)) >= len(long) - 1


def test_chat(server: Server) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)
    answer = client.chat.completions.create(model="model", messages=[{"role": "user", "content": "What is 2 + 2?"}], max_tokens=24, temperature=0.0)
    assert "4" in str(answer.choices[0].message.content)


def test_it_stops_cleanly(smollm2_folder: Path, server: Server) -> None:
    """The module's server, last: nothing in its log is a complaint."""
    assert server.stop() == 0
    assert not server.processes()
    complaints = [line for line in server.said.splitlines() if re.search(r"\bERROR\b|Traceback|spectralquant.*WARNING|WARNING.*spectralquant", line)]
    assert not complaints


def test_a_killed_worker_ends_the_server_and_the_next_one_starts(smollm2_folder: Path, tmp_path: Path) -> None:
    arguments = (*ARGUMENTS, "--distributed-executor-backend", "mp")
    with Server(smollm2_folder, tmp_path / "first.log", *arguments, packed={}) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)
        stream = client.completions.create(model="model", prompt=[5] * 300, max_tokens=1000, temperature=0.0, stream=True)
        next(iter(stream))
        workers = server.processes("Worker")
        assert workers
        os.kill(workers[0], signal.SIGKILL)
        with pytest.raises((APIError, httpx.HTTPError)):
            for _ in stream:
                pass
        assert server.ended(60) is not None, "the server goes on without its worker"
        assert re.search(r"EngineDeadError|died unexpectedly|Engine core.*(fail|died)|EngineCore.*fatal", server.said)
    with Server(smollm2_folder, tmp_path / "second.log", *arguments, packed={}) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
        assert client.completions.create(model="model", prompt=[5] * 300, max_tokens=4).choices[0].text is not None
