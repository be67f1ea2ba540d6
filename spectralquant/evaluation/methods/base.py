"""What a method is: a name, and a way to make caches for a model. Adding one is one file in this folder with a tuple METHODS."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache


@dataclass(frozen=True, slots=True)
class Subject:
    """The model under test, and what methods that need calibration may use.

    Attributes:
        model, tokenizer: As loaded; nobody changes their weights.
        folder: Where a method keeps files between runs (calibrations).
        calibration: The user's calibration file of this package, or None.
        calibration_cache: Whether one may be found among the kept ones, or kept, see `spectralquant.calibration_cache`.
    """

    model: PreTrainedModel
    tokenizer: Any
    folder: Path
    calibration: Path | None = None
    calibration_cache: bool = True


@dataclass(frozen=True, slots=True)
class Prepared:
    """A method made ready for one model.

    Attributes:
        cache: Makes an empty cache.
        bits: All-in bits per coded element (codes, scales, offsets, norms, exact outliers) of a cache that holds tokens.
        exact: Tokens of that cache that are stored in 16 bits on top: sinks and the recent window.
    """

    cache: Callable[[], Cache]
    bits: Callable[[Cache], float]
    exact: Callable[[Cache], int]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to keep a KV cache.

    Attributes:
        name: On the command line and in files.
        label: In tables.
        family: Methods of one family are joined by a line in plots.
        simulated: True when codes are not really stored, only their effect on the values is computed and their size counted.
        prepare: Makes it ready for a model.
    """

    name: str
    label: str
    family: str
    simulated: bool
    prepare: Callable[[Subject], Prepared]
