"""Raw inputs of a user, a few at a time, as a model takes them."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from spectralquant.config import require_int


def processed(items: Iterable[Any], process: Callable[[list[Any]], Any] | None, count: int | None, size: int) -> Iterable[Any]:
    """Batches that `process` makes of `size` items each, of the first `count` (None: of all); without `process` the items are batches."""
    count = None if count is None else require_int("n_calib", count, 1)
    size = require_int("batch_size", size, 1)
    chosen = islice(items, count)
    return chosen if process is None else map(process, _chunks(chosen, size))


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(items, size)):
        yield chunk
