"""Attention calls of any model, as a value, and the modules that make them.

Models of transformers that attend by its attention interface show their calls there. For every other attention module an adapter says where queries, keys,
values, mask and scale are, and what becomes of the result. Either way the model's own code does everything around the call: embeddings, rotation, gating,
projections.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """softmax(scale query key^T + mask) value.

    Attributes:
        query: [B, Hq, Q, D].
        key, value: [B, H, T, D], Hq a multiple of H.
        mask: Broadcastable to [B, Hq, Q, T]: bool, True where a query sees a key, or floats that are added to the logits (masks, relative or pair biases,
            or their sum); None hides nothing.
        scale: Factor of the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float

    def dense(self) -> Tensor:
        """[B, Hq, Q, D], from keys and values as they are."""
        groups = self.query.shape[1] // self.key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (self.key, self.value))
        return scaled_dot_product_attention(self.query, key, value, self.mask, scale=self.scale)


Handler = Callable[[nn.Module, AttentionCall], Tensor]
"""Gives the result [B, Hq, Q, D] of a module's call."""


class AttentionAdapter(Protocol):
    """What to know about attention modules that transformers' attention interface does not serve."""

    def takes(self, module: nn.Module) -> bool:
        """Whether this adapter is for `module`."""
        ...

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> AttentionCall:
        """The call that `module` makes for these arguments of its forward."""
        ...

    def result(self, module: nn.Module, out: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the forward returns when attention gives `out` [B, Hq, Q, D]: merged heads, gate, projection."""
        ...


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """[B, T, H D] -> [B, H, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_merged(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H D]."""
    return x.transpose(1, 2).flatten(2)
