"""What a task is, and the two steps all tasks share: run the context once uncompressed, then hand it to every method's cache.

A prompt is always attended to uncoded, by every method here and in use: caches code what they store after the prompt was read. So the uncompressed
keys and values of a context are the same for all methods, are computed once, and are fed to each cache through its own `update`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from spectralquant.compat import cache_argument
from spectralquant.evaluation.methods import Prepared, Subject
from spectralquant.evaluation.plan import Plan

READ_PIECE = 4096
"""Tokens of a context read at a time: attention kernels that keep all scores (float32 with grouped queries on a GPU) need memory for so many rows only."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work that all methods do alike, and that is not cut in two by an interruption.

    Attributes:
        key: Unique in the task, part of every row.
        content: What the task needs to run it.
        fields: Columns of every row.
    """

    key: str
    content: Any
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of measurement.

    Attributes:
        name: On the command line and in rows.
        units: The units of a plan, the same ones for the same plan, tokenizer and text.
        measure: (unit, plan, subject, methods by name) -> (method name, columns) for every method; context work is done once.
    """

    name: str
    units: Callable[[Plan, Subject], list[Unit]]
    measure: Callable[[Unit, Plan, Subject, dict[str, Prepared]], Iterator[tuple[str, dict[str, Any]]]]


@torch.no_grad()
def read_context(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Uncompressed keys and values [B, H, T, D] of every layer for ids [B, T]; sliding layers in full, so that caches can cut them."""
    cache = DynamicCache()
    for piece in ids.split(READ_PIECE, 1):
        model.base_model(input_ids=piece, use_cache=True, **cache_argument(model, cache))
    layers: list[Any] = list(cache.layers)
    return [(layer.keys, layer.values) for layer in layers]


def hand_over(context: list[tuple[Tensor, Tensor]], cache: Cache) -> Cache:
    """Store a context in an empty cache; returns the cache."""
    for index, (keys, values) in enumerate(context):
        cache.update(keys, values, index)
    return cache


@torch.no_grad()
def continue_with(model: PreTrainedModel, cache: Cache, ids: Tensor, chunk: int) -> Tensor:
    """Logits [T, vocabulary] float32 of ids [1, T] after the cache's content, fed in pieces of `chunk`."""
    pieces = [model(input_ids=piece, use_cache=True, **cache_argument(model, cache)).logits[0].float() for piece in ids.split(chunk, 1)]
    return torch.cat(pieces)


@torch.no_grad()
def generate_greedily(model: PreTrainedModel, cache: Cache, ids: Tensor, chunk: int, count: int, stop: Callable[[list[int]], bool]) -> list[int]:
    """At most `count` tokens after ids [1, T], which are fed in pieces of `chunk`; ends early when `stop` says so of the tokens so far."""
    logits = continue_with(model, cache, ids, chunk)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count and not stop(tokens):
        step = torch.tensor([tokens[-1:]], device=ids.device)
        tokens.append(int(continue_with(model, cache, step, 1)[-1].argmax()))
    return tokens
