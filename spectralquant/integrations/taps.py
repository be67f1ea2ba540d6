"""Handing the attention calls of one model to a handler, and putting the model back.

What is changed belongs to the model: the attention implementation in its configuration, `forward` of adapted modules and a hook on them, and whether
PyTorch's `TransformerEncoder` makes ragged batches. transformers' table of attention functions gets one name more, which no other model uses.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from spectralquant.integrations.calls import AttentionAdapter, AttentionCall, Handler

NAME = "spectralquant-encoder"
_handlers: WeakKeyDictionary[nn.Module, Handler] = WeakKeyDictionary()


def tap(model: nn.Module, modules: Iterable[nn.Module], handler: Handler, adapters: Sequence[AttentionAdapter] = ()) -> "Taps":
    """Let `handler` answer the attention calls of those `modules` of `model` that make any."""
    taps = Taps(model)
    try:
        for module in modules:
            adapter = next((a for a in adapters if a.takes(module)), None)
            if adapter is not None:
                taps.adapt(module, adapter, handler)
            _handlers[module] = handler
            taps.modules.append(module)
        taps.use_interface()
    except BaseException:
        taps.remove()
        raise
    return taps


@contextmanager
def tapped(model: nn.Module, modules: Iterable[nn.Module], handler: Handler, adapters: Sequence[AttentionAdapter] = ()) -> Generator[None]:
    """`tap` for the length of a with block."""
    taps = tap(model, modules, handler, adapters)
    try:
        yield
    finally:
        taps.remove()


class Taps:
    """What was changed of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self._adapted: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []
        self._nested = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
        for encoder in self._nested:
            encoder.use_nested_tensor = False  # ragged batches are for the fused layers alone
        self._parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m._can_set_attn_implementation()]  # pyright: ignore[reportPrivateUsage]
        self._before = [str(m.config._attn_implementation) for m in self._parts]  # pyright: ignore[reportPrivateUsage]

    def adapt(self, module: nn.Module, adapter: AttentionAdapter, handler: Handler) -> None:
        """Take the place of this module's forward."""
        own = module.forward

        @wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return adapter.result(module, handler(module, adapter.call(module, *args, **kwargs)), *args, **kwargs)

        module.forward = forward
        self._adapted.append(module)
        self._hooks.append(module.register_forward_pre_hook(lambda *_: None))  # PyTorch's fused layers, which pass attention by, stand back for hooks

    def use_interface(self) -> None:
        """Let the parts of the model that can attend by `_attention`."""
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        for part in self._parts:
            part.set_attn_implementation(NAME)

    def remove(self) -> None:
        """Put everything back."""
        for part, name in zip(self._parts, self._before, strict=True):
            part.set_attn_implementation(name)
        for module in self._adapted:
            del module.forward
        for hook in self._hooks:
            hook.remove()
        for encoder in self._nested:
            encoder.use_nested_tensor = True
        for module in self.modules:
            _handlers.pop(module, None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, Hq, Q, D] -> [B, Q, Hq, D]."""
    handler = _handlers.get(module)
    if handler is None or dropout or _is_causal(module, attention_mask, query, kwargs):
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    call = AttentionCall(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return handler(module, call).transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module, mask: Tensor | None, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the order hides keys that no mask says: decoders, whose caches are the business of `SpectralQuant`."""
    said = kwargs.get("is_causal")
    return mask is None and query.shape[2] > 1 and bool(getattr(module, "is_causal", False) if said is None else said)
