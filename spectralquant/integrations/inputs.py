"""Inputs of a user, a few at a time, as a model takes them."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from spectralquant.config import require_int

Inputs = Iterable[Any] | Callable[[Any], Any]
"""Batches, each a mapping of the model's arguments, a tensor, or a tuple of positional ones; or a function that runs the model and returns its output."""


def processed(items: Iterable[Any], process: Callable[[list[Any]], Any] | None, count: int | None, size: int) -> Iterable[Any]:
    """Batches that `process` makes of `size` items each, of the first `count` (None: of all); without `process` the items are batches."""
    count = None if count is None else require_int("n_calib", count, 1)
    size = require_int("batch_size", size, 1)
    chosen = islice(items, count)
    return chosen if process is None else map(process, _chunks(chosen, size))


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(items, size)):
        yield chunk


def run_model(model: nn.Module, inputs: Inputs) -> Iterator[tuple[Any, Any]]:
    """Show the model all inputs, without gradients: (batch, output) of each; of a function (None, what it returns)."""
    if callable(inputs):
        with torch.no_grad():
            yield None, inputs(model)
        return
    device = device_of(model)
    for batch in inputs:
        with torch.no_grad():
            if isinstance(batch, Mapping):
                out = model(**{name: _moved(value, device) for name, value in batch.items()})
            elif isinstance(batch, (tuple, list)):
                out = model(*(_moved(value, device) for value in batch))
            else:
                out = model(_moved(batch, device))
        yield batch, out


def device_of(*modules: nn.Module) -> torch.device:
    """Of the weights of the first module that has any."""
    return next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode for the length of a with block; every module then has the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
