"""A tokenizer that can be read back, a text, and a subject, for all tasks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import DynamicCache, PreTrainedModel

from spectralquant.evaluation.methods import Prepared, Subject


class CharTokenizer:
    """One token per character, ids below the tiny models' 199; text comes back as it was. A text starts with token 1, and is padded with its
    end token like many real ones, so that nobody can tell padding from the ids alone."""

    pad_token_id = eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None) -> Any:
        ids = [1] * add_special_tokens + [ord(c) if c.isascii() else 150 for c in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join("ø" if i == 150 else chr(i) for i in map(int, ids) if i > 2 or not skip_special_tokens)


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """12,000 characters of sentences and lines of different lengths, all different."""
    sentences = [f"Sentence {i} tells how {'very ' * (i % 5)}small house {i * 7} was built." for i in range(230)]
    path = tmp_path / "story.txt"
    path.write_text("".join(s + ("\n" if i % 4 == 3 else " ") for i, s in enumerate(sentences)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def talkative() -> PreTrainedModel:
    """A tiny llama with embeddings of a trained model's size and sharper attention: it generates different tokens for different prompts,
    where the usual tiny models repeat one token, whatever they have read."""
    model = tiny_model("llama")
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight.mul_(20.0)
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(4.0)
    return model


@pytest.fixture
def subject(talkative: PreTrainedModel, tmp_path: Path) -> Subject:
    return Subject(talkative, CharTokenizer(), tmp_path)


@pytest.fixture
def plain() -> Prepared:
    """transformers' own cache: nothing is rounded."""
    return Prepared(DynamicCache, lambda cache: 32.0, lambda cache: 0)
