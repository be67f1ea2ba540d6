"""Options of transformers' `generate`, wherever they come from."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from spectralquant.generation_options import finishing_tokens, is_assisted, last_length, prefill_piece, sequences_each

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


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        ({}, None),
        ({"prefill_chunk_size": 64}, 64),
        ({"generation_config": GenerationConfig(prefill_chunk_size=32)}, 32),
        ({"prefill_chunk_size": None, "generation_config": GenerationConfig(prefill_chunk_size=32)}, None),
    ],
    ids=str,
)
def test_pieces_of_a_prompt(options: dict[str, Any], piece: int | None) -> None:
    assert prefill_piece(MODEL, options) == piece
    assert prefill_piece(SimpleNamespace(generation_config=GenerationConfig(prefill_chunk_size=16)), options) == (
        piece if piece or "prefill_chunk_size" in options else 16
    )


@pytest.mark.parametrize(
    ("options", "assisted"),
    [({}, False), ({"prompt_lookup_num_tokens": 4}, True), ({"generation_config": GenerationConfig(assistant_early_exit=1)}, True)],
    ids=str,
)
def test_candidates(options: dict[str, Any], assisted: bool) -> None:
    assert is_assisted(MODEL, options) is assisted
