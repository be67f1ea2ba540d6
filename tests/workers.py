"""What processes of tests do. They import it by this name."""

from functools import cache
from typing import Any

import torch
from tiny_models import TinyTokenizer
from transformers import AutoModelForCausalLM

from spectralquant import SpectralQuantEngine


def one_thread() -> None:
    """Torch's threads don't survive a fork."""
    torch.set_num_threads(1)


@cache
def from_files(model: str, calibration: str) -> tuple[Any, SpectralQuantEngine]:
    engine = SpectralQuantEngine()
    engine.load_calibration(calibration)
    return AutoModelForCausalLM.from_pretrained(model), engine


def answer(model: Any, engine: SpectralQuantEngine, prompt: list[int]) -> list[int]:
    return engine.generate(model, TinyTokenizer(), prompt, 12, do_sample=False, eos_token_id=None)["tokens"]


def answer_from_files(model: str, calibration: str, prompt: list[int]) -> list[int]:
    return answer(*from_files(model, calibration), prompt)


INHERITED: list[tuple[Any, SpectralQuantEngine]] = []
"""Filled before a fork."""


def answer_inherited(prompt: list[int]) -> list[int]:
    return answer(*INHERITED[0], prompt)
