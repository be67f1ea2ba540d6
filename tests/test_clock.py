"""Where the time of a generation goes."""

from typing import Any

import pytest
import torch
from tiny_models import TinyTokenizer
from transformers import LogitsProcessor, PreTrainedModel

from spectralquant.clock import GenerationTimes
from spectralquant.engine import SpectralQuantEngine
from spectralquant.stopwatch import Stopwatch

PARTS = ("prefill_seconds", "compress_seconds", "decode_seconds")


def test_parts_make_the_whole(engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer) -> None:
    stats = engine.generate(llama, tokenizer, torch.randint(3, 99, (400,)).tolist(), 150, min_new_tokens=150)["stats"]
    assert sum(stats[p] for p in PARTS) == pytest.approx(stats["seconds"]) and all(stats[p] > 0 for p in PARTS)
    assert stats["prefill_seconds"] < stats["time_to_first_token"] < stats["seconds"]
    decode = stats["seconds"] - stats["time_to_first_token"]
    assert stats["decode_tokens_per_second"] == pytest.approx(149 / decode)


@pytest.mark.parametrize("count", [0, 1])
def test_without_further_tokens(engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer, count: int) -> None:
    stats = engine.generate(llama, tokenizer, [5, 6, 7], count)["stats"]
    assert stats["decode_tokens_per_second"] == 0 and stats["compress_seconds"] == 0


def test_times_of_packing_are_counted_once() -> None:
    times = GenerationTimes(seconds=10.0, first_token=4.0, prompt_packing=1.0, packing=1.5)
    stats = times.stats(12)
    assert [stats[p] for p in PARTS] == [3.0, 1.5, 5.5] and stats["decode_tokens_per_second"] == 2.0


def test_the_clock_looks_on_beside_other_processors(engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer) -> None:
    class Only(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([42]), 0.0)

    assert engine.generate(llama, tokenizer, [5, 6, 7], 4, logits_processor=[Only()])["tokens"] == [42] * 4


def test_a_block_inside_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr("spectralquant.stopwatch.time.perf_counter", lambda: next(now))
    watch = Stopwatch(torch.device("cpu"))
    with watch.running(), watch.running():
        pass
    with watch.running():
        pass
    assert watch.seconds() == 2.5


@pytest.mark.gpu
def test_a_stopwatch_takes_the_time_of_the_device() -> None:
    """Of work that the host only launches."""
    x = torch.randn(4096, 4096, device="cuda")
    watch = Stopwatch(x.device)
    with watch.running():
        x @ x
    assert watch.seconds() > 0
