"""Caches of methods whose codes are not stored: values go through the method's rounding as they leave its exact window, and stay dense.

What a model reads is what it would read from the real codes; the memory is not, so bits are counted, never measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from spectralquant.cache.hf import dense_layers
from spectralquant.evaluation.methods.base import Method, Prepared, Subject

Rounding = Callable[[Tensor], Tensor]
"""[B, H, n, D] of any float dtype -> what is decoded after coding it, same shape and dtype."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How one layer is coded.

    Attributes:
        key, value: Roundings.
        key_block, value_block: Tokens that are coded together; fewer than a block stay exact.
        key_window, value_window: Newest tokens that stay exact whatever the blocks.
        sinks: First tokens that stay exact.
    """

    key: Rounding
    value: Rounding
    key_block: int = 1
    value_block: int = 1
    key_window: int = 0
    value_window: int = 0
    sinks: int = 0


class SimulatedLayer(DynamicLayer):
    """One layer under a rule. The first update, the prompt, is returned as it came; after that attention sees rounded values."""

    coded_keys: int
    coded_values: int

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.coded_keys = self.coded_values = rule.sinks

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        first = not self.get_seq_length()
        self.keys: Tensor  # the base class declares them optional
        self.values: Tensor
        super().update(key_states, value_states, *args, **kwargs)
        if first:
            self.keys, self.values = key_states.clone(), value_states.clone()
        rule = self.rule
        self.coded_keys = _round(self.keys, rule.key, self.coded_keys, rule.key_block, rule.key_window)
        self.coded_values = _round(self.values, rule.value, self.coded_values, rule.value_block, rule.value_window)
        return (key_states, value_states) if first else (self.keys, self.values)


def _round(x: Tensor, rounding: Rounding, done: int, block: int, window: int) -> int:
    """Round the slots of x [B, H, T, D] from `done` on, in place, that are due; returns the slot up to which all are rounded."""
    due = done + max(x.shape[2] - window - done, 0) // block * block
    if due > done:
        x[:, :, done:due] = rounding(x[:, :, done:due])
    return due


def simulated(name: str, label: str, family: str, rules: Callable[[Subject], Callable[[int], Rule]], bits: Callable[[int], float]) -> Method:
    """A method without real codes.

    Args:
        rules: Subject -> (layer index -> rule).
        bits: Head size -> all-in bits per element.
    """

    def prepare(subject: Subject) -> Prepared:
        rule = rules(subject)
        return Prepared(lambda: _cache(subject.model, rule), lambda cache: bits(_coded(cache)[0].keys.shape[-1]), _exact_tokens)

    return Method(name, label, family, True, prepare)


def _cache(model: PreTrainedModel, rule: Callable[[int], Rule]) -> Cache:
    """Plain growing layers are coded; sliding windows stay as they are, like in this package's own cache."""
    layers = dense_layers(model.config)
    return Cache(layers=[SimulatedLayer(rule(i)) if type(layer) is DynamicLayer else layer for i, layer in enumerate(layers)])


def _coded(cache: Cache) -> list[SimulatedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, SimulatedLayer)]


def _exact_tokens(cache: Cache) -> int:
    """Mean over K and V."""
    layer = _coded(cache)[0]
    coded = layer.coded_keys + layer.coded_values - 2 * layer.rule.sinks
    return layer.get_seq_length() - coded // 2
