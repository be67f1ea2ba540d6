"""Options of transformers' `generate`, wherever they come from."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from spectralquant.generation_options import finishing_tokens, last_length, sequences_each

MODEL = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=7, max_length=99))


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 1),
        ({"num_beams": 4}, 4),
        ({"num_return_sequences": 3}, 3),
        ({"num_beams": 4, "num_return_sequences": 2}, 4),
        ({"generation_config": GenerationConfig(num_beams=5)}, 5),
    ],
    ids=str,
)
def test_rows_of_a_prompt(options: dict[str, Any], rows: int) -> None:
    assert sequences_each(MODEL, options) == rows


@pytest.mark.parametrize("ends", [7, [7], (7,), torch.tensor([7])], ids=str)
def test_ends_in_every_form(ends: Any) -> None:
    assert finishing_tokens(MODEL, {"eos_token_id": ends}) == (7,)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 99),
        ({"max_new_tokens": 5}, 25),
        ({"max_length": 50}, 50),
        ({"max_new_tokens": 5, "max_length": 50}, 25),
        ({"generation_config": GenerationConfig(max_new_tokens=30)}, 50),
    ],
    ids=str,
)
def test_the_last_length(options: dict[str, Any], length: int) -> None:
    assert last_length(MODEL, options, 20) == length
