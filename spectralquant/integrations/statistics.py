"""What an encoder's attention calls show of their keys, queries and values."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectralquant.calibration.hf import output_metric
from spectralquant.calibration.statistics import LayerStatistics
from spectralquant.errors import UnsupportedModelError
from spectralquant.integrations.calls import AttentionCall

QUERIES = 256
"""Queries of a sequence that are looked at, spread over it."""
HIDES = -1e4
"""What is added to a logit to hide a key: this or less. Models take the least number of their dtype, or -1e9."""


@dataclass(slots=True)
class Recorder:
    """A handler that looks at calls and gives their dense result.

    Attributes:
        names: Module -> its name in the model.
        layers: Name -> statistics, in the order in which modules first attended.
        output_metric: Name -> W_O metric [H, D, D] float64, where the output projection is in the attention module.
        tokens: Name -> tokens that counted.
    """

    names: dict[nn.Module, str]
    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    output_metric: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def __call__(self, module: nn.Module, call: AttentionCall) -> Tensor:
        name = self.names[module]
        if name not in self.layers:
            self._first_sight(name, module, call)
        heads, seen = call.key.shape[1], visible(call)
        asked = torch.linspace(0, call.query.shape[2] - 1, min(QUERIES, call.query.shape[2]), device=call.query.device).long()
        query = call.query[:, :, asked].unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)
        key, value = (x.transpose(0, 1).flatten(1, 2)[:, seen] for x in (call.key, call.value))
        self.layers[name].add(key, query, value)
        self.tokens[name] += key.shape[1]
        return call.dense()

    def _first_sight(self, name: str, module: nn.Module, call: AttentionCall) -> None:
        if call.key.shape[-1] != call.value.shape[-1]:
            raise UnsupportedModelError(f"{name} has keys of size {call.key.shape[-1]} and values of size {call.value.shape[-1]}; the codec needs one size")
        self.layers[name], self.tokens[name] = LayerStatistics(), 0
        heads = call.key.shape[1]
        metric = output_metric(module, heads, call.query.shape[1] // heads, call.key.shape[-1])
        if metric is not None:
            self.output_metric[name] = metric


def visible(call: AttentionCall) -> Tensor:
    """[B T] bool: tokens that some query sees; the others are padding."""
    batch, _, length, _ = call.key.shape
    if call.mask is None:
        return torch.ones(batch * length, dtype=torch.bool, device=call.key.device)
    shown = call.mask if call.mask.dtype == torch.bool else call.mask > HIDES
    while shown.dim() < 4:
        shown = shown[None]
    return shown.any(2).any(1).expand(batch, length).flatten()
