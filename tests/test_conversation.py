"""A conversation reads each token once, and says what a model that reads everything anew would say."""

from typing import Any

import pytest
import torch
from tiny_models import TinyTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from spectralquant import SpectralQuantEngine
from spectralquant.conversation import Conversation
from spectralquant.errors import ConfigError

LONG = "Tell me more about the rivers and the hills of this country. " * 8


@pytest.fixture
def parts(engine: SpectralQuantEngine, model_folder: str) -> tuple[SpectralQuantEngine, Any, Any]:
    return engine, AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)


def test_turns_read_only_what_is_new(parts: tuple[SpectralQuantEngine, Any, Any]) -> None:
    engine, model, tokenizer = parts
    talk = Conversation(engine, model, tokenizer, system="Be brief.")
    first = talk.reply(LONG, 4, do_sample=False)
    whole = len(tokenizer.apply_chat_template(talk.messages[:2], tokenize=False, add_generation_prompt=True))
    assert first["read_tokens"] == whole and first["new_tokens"] == 4 and talk.messages[-1] == {"role": "assistant", "content": first["text"]}
    second = talk.reply("And then?", 4, do_sample=False)
    assert second["read_tokens"] < 60 and second["turns"] == 2
    assert talk.cache.get_seq_length() == second["seq_len"] and second["ratio"] == talk.cache.dense_bytes / talk.cache.nbytes


def test_answers_are_those_of_one_pass(parts: tuple[SpectralQuantEngine, Any, Any]) -> None:
    """Within the window nothing is packed: then the cache holds exactly what a dense one would."""
    engine, model, tokenizer = parts
    talk = Conversation(engine, model, tokenizer)
    for text in ("hello", "and then", "why"):
        answer = talk.reply(text, 5, do_sample=False)["text"]
        prompt = tokenizer.apply_chat_template(talk.messages[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert answer == tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)


def test_interrupted_turn_is_forgotten(parts: tuple[SpectralQuantEngine, Any, Any]) -> None:
    engine, model, tokenizer = parts

    class Impatient(BaseStreamer):
        calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    talk, calm = (Conversation(engine, model, tokenizer) for _ in range(2))
    for each in (talk, calm):
        each.reply(LONG, 4, do_sample=False)
    with pytest.raises(KeyboardInterrupt):
        talk.reply("never mind", 8, do_sample=False, streamer=Impatient())
    assert talk.messages == calm.messages and talk.cache.get_seq_length() <= calm.cache.get_seq_length()
    assert talk.reply("go on", 6, do_sample=False)["text"] == calm.reply("go on", 6, do_sample=False)["text"]


def test_reset(parts: tuple[SpectralQuantEngine, Any, Any]) -> None:
    engine, model, tokenizer = parts
    talk = Conversation(engine, model, tokenizer, system="Be brief.")
    first = talk.reply(LONG, 3, do_sample=False)
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}] and talk.stats()["seq_len"] == 0 and talk.stats()["turns"] == 0
    assert talk.reply(LONG, 3, do_sample=False)["text"] == first["text"]


def test_rejects(engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer, parts: tuple[SpectralQuantEngine, Any, Any]) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        Conversation(engine, llama, tokenizer)
    talk = Conversation(*parts)
    with pytest.raises(ConfigError, match="message is empty"):
        talk.reply(" ")
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        talk.reply("hello", 0)
