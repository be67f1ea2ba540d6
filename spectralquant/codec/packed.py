"""PackedKV: what a cache hands to attention, and LazyKV, the tensor that carries it through a model.

A cached sequence is three disjoint sets of slots: packed (slots below `packed` whose gain code is not masked), exact (sinks
and secondary sinks, unordered), and raw (the recent window and the tokens of this call, slots `packed` .. `length - 1`).
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_map

from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import UNIT
from spectralquant.codec.prefix import Prefix
from spectralquant.codec.units import decode_units
from spectralquant.errors import GradientError


@dataclass(frozen=True, slots=True)
class PackedKV:
    """One layer's keys and values. B sequences, H KV heads of size D.

    Attributes:
        codec: Constants that decode `records`.
        records: [B, H, U, record_bytes] uint8, U units allocated, those behind `prefix`.
        packed: Tokens in the packed store, a multiple of 128.
        exact_keys, exact_values: [B, H, E, D], 16-bit.
        exact_slots: [B, E] int32; -1 marks an unused entry.
        raw_keys, raw_values: [B, H, R, D], 16-bit or model dtype; slots `packed` .. `packed + R - 1`.
        start: [B] int64, slots of left padding.
        padding: The same on the host.
        lengths: [B, 2] int32, units packed and tokens raw, as kernels read them.
        dtype: The model's dtype.
        tile_tokens: Tokens that tile-wise readers unpack at a time.
        kernels: Whether CUDA kernels may read it.
        causal: Queries see what causal order and left padding let them see, whatever mask a model makes.
        prefix: Units in front of `records`, held once for several sequences; None: there are none.
    """

    codec: LayerCodec
    records: Tensor
    packed: int
    exact_keys: Tensor
    exact_values: Tensor
    exact_slots: Tensor
    raw_keys: Tensor
    raw_values: Tensor
    start: Tensor
    padding: tuple[int, ...]
    lengths: Tensor
    dtype: torch.dtype
    tile_tokens: int
    kernels: bool
    causal: bool = False
    prefix: Prefix | None = None

    @property
    def room(self) -> int:
        """Units allocated."""
        return self.records.shape[2] + (self.prefix.units if self.prefix is not None else 0)

    @property
    def length(self) -> int:
        return self.packed + self.raw_keys.shape[-2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, _, dim = self.raw_keys.shape
        return batch, heads, self.length, dim

    def exact_valid(self) -> Tensor:
        """[B, E] bool: entries that stand for a slot of the packed store (later ones are still raw)."""
        return (self.exact_slots >= 0) & (self.exact_slots < self.packed)

    def dense(self, which: str) -> Tensor:
        """Keys ("key") or values ("value") of every slot, [B, H, length, D] in the model dtype. Attention over them adds no `missing_mass`."""
        raw = self.raw_keys if which == "key" else self.raw_values
        out = raw.new_empty(self.shape, dtype=self.dtype)
        out[:, :, self.packed :] = raw
        for first in range(0, self.packed, self.tile_tokens):
            last = min(first + self.tile_tokens, self.packed)
            records = self.units(first // UNIT, last // UNIT)
            decode_units(self.codec, records, which, first, self.start, out[:, :, first:last].transpose(1, 2), kernels=self.kernels)
        exact = self.exact_keys if which == "key" else self.exact_values
        valid, heads = self.exact_valid(), torch.arange(raw.shape[1], device=raw.device)
        for row in range(raw.shape[0]):
            at = valid[row].nonzero()[:, 0]
            out[row, heads[:, None], self.exact_slots[row, at].long()[None]] = exact[row][:, at].to(self.dtype)
        return out

    def units(self, first: int, last: int) -> Tensor:
        """Records [B, H, last - first, record_bytes] of these units: a part of a contiguous store, or a copy where the prefix has some of them."""
        shared = 0 if self.prefix is None else self.prefix.units
        own = self.records[:, :, max(first - shared, 0) : max(last - shared, 0)]
        return own if self.prefix is None or first >= shared else torch.cat([self.prefix.read(first, min(last, shared)), own], 2)


@contextmanager
def plain_arithmetic(device: torch.device) -> Generator[None]:
    """Where codes are written and read: without autocast, whose 16-bit products would coarsen them, without autograd, which they have none of, and without
    inference mode, whose tensors could not be written outside of it later."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class _WithoutGradient(torch.autograd.Function):
    """Tensors whose gradient is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise GradientError(
            "gradients don't flow through packed keys and values; train without a compressed cache (use_cache=False, or past_key_values=None), "
            "and run what only reads one under torch.no_grad()"
        )


def without_gradient(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`outputs`, made of `inputs` in a way that has no gradient: `backward` through them raises GradientError instead of giving a wrong one."""
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
        return outputs
    return _WithoutGradient.apply(len(outputs), *outputs, *inputs)  # pyright: ignore[reportReturnType]


class LazyKV(torch.Tensor):
    """A tensor [B, H, T, D] that stands for packed keys or values.

    Our attention function recognises it and reads `packed_kv`, and so do functions that `implements` knows. Any other operation decodes it first: foreign
    code is slower, never wrong, and holds one layer's dense K or V at a time.
    """

    _implemented: ClassVar[dict[Any, Callable[..., Any]]] = {}
    packed_kv: PackedKV
    which: str

    @staticmethod
    def __new__(cls: type["LazyKV"], packed_kv: PackedKV, which: str) -> "LazyKV":
        raw = packed_kv.raw_keys
        out = torch.Tensor._make_wrapper_subclass(cls, packed_kv.shape, dtype=packed_kv.dtype, device=raw.device)  # pyright: ignore
        out.packed_kv, out.which = packed_kv, which
        return out

    def __init__(self, packed_kv: PackedKV, which: str) -> None:
        super().__init__()

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"LazyKV({self.which}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def dense(self) -> Tensor:
        """What this tensor stands for."""
        with plain_arithmetic(self.packed_kv.records.device):
            return self.packed_kv.dense(self.which)

    @classmethod
    def implements(cls, func: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: call what is decorated in the place of the torch function `func`. It returns NotImplemented for arguments that it can't take."""

        def keep(mine: Callable[..., Any]) -> Callable[..., Any]:
            cls._implemented[func] = mine
            return mine

        return keep

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mine, kwargs = cls._implemented.get(func), kwargs or {}
        out = NotImplemented if mine is None else mine(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if isinstance(func, HigherOrderOperator):  # flex attention is one: they have no way to `__torch_dispatch__`
            args, kwargs = tree_map(_joined, args), tree_map(_joined, kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))


def _dense(x: Any) -> Any:
    return x.dense() if isinstance(x, LazyKV) else x


def _joined(x: Any) -> Any:
    """`_dense`, in the graph that `x` is in."""
    return without_gradient((x.dense(),), (x,))[0] if isinstance(x, LazyKV) else x
