"""Queries, keys and values of attention modules that do their own products, read from these.

Attention is two products, whatever a model does around them: queries with keys, then weights with values. Inside an attention module no others are taken of
states (projections are `linear`), so the first pair is them. Heads may be an axis of their own or be merged with the batch. The factor of the logits is
what the weights say it was: log p grows with q . k by that factor, whatever grows with the position beside it (ALiBi).
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

OnAttention = Callable[[nn.Module, Tensor, Tensor, Tensor, float, float | None], None]
"""(module, query [B, Hq, Q, D], key [B, H, T, D], value, scale, soft-cap or None)."""
BeforeModule = Callable[[nn.Module, Any, dict[str, Any]], None]
"""A forward pre-hook with keyword arguments."""
_SDPA = nn.functional.scaled_dot_product_attention
_PRODUCTS: dict[Any, int] = {torch.matmul: 0, torch.bmm: 0, Tensor.matmul: 0, Tensor.__matmul__: 0, Tensor.bmm: 0, torch.baddbmm: 1, Tensor.baddbmm: 1}
"""Function -> index of its first factor."""


def layer_index(module: nn.Module) -> int | None:
    """The layer that a module says it is of; `layer_id` is GPT-Neo's word."""
    index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
    return index if isinstance(index, int) else None


@contextmanager
def watching_products(modules: Iterable[nn.Module], on_attention: OnAttention) -> Generator[None]:
    """For the length of a with block, call `on_attention` with what the attention modules among `modules` multiply."""
    watcher = _Watcher(on_attention)
    hooks: list[Any] = []
    try:
        for module in modules:
            hooks.append(module.register_forward_pre_hook(watcher.enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(watcher.leave))
        with watcher:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Watcher(TorchFunctionMode):
    def __init__(self, on_attention: OnAttention) -> None:
        super().__init__()
        self.on_attention = on_attention
        self.module: nn.Module | None = None  # the innermost one that is running and has not attended
        self.batch = 1
        self.states: tuple[Tensor, Tensor] | None = None  # queries and keys of the first product

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(hidden, Tensor):
            self.module, self.batch, self.states = module, hidden.shape[0], None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.module = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.module is not None and func is _SDPA:
            query, key, value = _arguments(args, kwargs, ("query", "key", "value"))
            self._attended(query, key, value, kwargs.get("scale") or query.shape[-1] ** -0.5)
        elif self.module is not None and func in _PRODUCTS:
            self._product(*_factors(func, args, kwargs))
        return func(*args, **kwargs)

    def _product(self, left: Tensor, right: Tensor) -> None:
        if min(left.dim(), right.dim()) < 3:
            return
        if self.states is None:
            self.states = left, right.mT
        elif left.shape[-1] == self.states[1].shape[-2] == right.shape[-2]:
            self._attended(*self.states, right, measured_scale(*self.states, left))

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        module, self.module = self.module, None
        assert module is not None
        query, key, value = (x if x.dim() == 4 else x.unflatten(0, (self.batch, -1)) for x in (query, key, value))
        groups = int(getattr(module, "num_key_value_groups", 1))
        if key.shape[1] == query.shape[1]:  # repeated for the product (StableLM before transformers 5)
            key, value = key[:, ::groups], value[:, ::groups]
        self.on_attention(module, query, key, value, scale, None)


def measured_scale(query: Tensor, key: Tensor, weights: Tensor) -> float:
    """The factor s with weights = softmax(s q . k + b + c t), t the position of the key, from what the last query sees.

    query [..., Q, D], key [..., T, D], weights [..., Q, T]; b and c are free in every head.
    """
    scores = (query[..., -1:, :].float() @ key.float().mT).double()
    seen = (weights[..., -1:, :] > 1e-30).double()
    log = weights[..., -1:, :].double().clamp_min(1e-30).log()
    constant, line = seen, torch.arange(key.shape[-2], dtype=torch.float64, device=key.device) * seen
    line = _without(line, constant)
    scores, log = (_without(_without(x * seen, constant), line) for x in (scores, log))
    return float((scores * log).sum() / scores.square().sum().clamp_min(1e-30))


def _without(x: Tensor, direction: Tensor) -> Tensor:
    """Rows of x less their part along those of `direction`."""
    return x - direction * ((x * direction).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True).clamp_min(1e-30))


def _factors(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    first = _PRODUCTS[func]
    return _arguments(args[first:], kwargs, ("batch1", "batch2") if first else ("mat2", "other"))


def _arguments(args: Any, kwargs: dict[str, Any], names: tuple[str, ...]) -> list[Tensor]:
    """The first arguments, by place or by name."""
    return [*args, *(kwargs[name] for name in names if name in kwargs)][: len(names)]
