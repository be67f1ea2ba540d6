"""transformers' own `QuantizedCache`, as installed: real codes, with the backends quanto (optimum-quanto) and HQQ.

Groups of 64 consecutive values along the head dimension have a scale and a zero point each, for keys as for values (the axes that
transformers' documentation recommends: 0 for quanto, 1 for HQQ; both mean rows of 64 here). The first update, the prompt, is coded in
one piece whatever its length; later tokens stay exact until there are 128 of them, and then the whole history is decoded and coded again.

Size: both backends pack 2-bit and 4-bit codes into bytes, so bytes are counted as stored. Scales and zero points count 16 bits each, also where
a float32 model makes the library keep them in float32. Groups that pad the last byte are counted, as they are stored.

Both need KV heads x head size to be a multiple of 64. HQQ packs two (int4) or four (int2) rows into one and fails for other numbers of rows, so rows
of zeros are added (`_PaddedHqq`). quanto decodes with code that it compiles on first use, for about half a minute on a CPU: that
needs ninja, a C++ compiler (on CUDA: nvcc) and leave to write to the package's own folder. `prepare` tries it out.
"""

import math
from collections.abc import Iterator
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, QuantizedCache

from spectralquant.cache.hf import kv_size
from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods.base import Method, Prepared, Subject

GROUP, RESIDUAL = 64, 128
PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
AXES = {"quanto": 0, "hqq": 1}


class _PaddedHqq:
    """HQQ's quantizer for any number of rows. Rows of zeros have no error, so they do not move the fit of the others."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def quantize(self, tensor: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        rows = tensor.reshape(-1, options["group_size"])
        codes, meta = self.quantizer.quantize(pad(rows, (0, 0, 0, -len(rows) % (8 // options["nbits"]))), **options)
        return codes, {**meta, "unpadded": tensor.shape}

    def cuda(self, codes: Tensor, meta: dict[str, Any], device: Any) -> Any:
        return self.quantizer.cuda(codes, meta=meta, device=device)

    def dequantize(self, codes: Tensor, meta: dict[str, Any]) -> Tensor:
        shape = meta["unpadded"]
        return self.quantizer.dequantize(codes, meta).flatten()[: math.prod(shape)].reshape(shape)


def _prepare(subject: Subject, backend: str, bits: int) -> Prepared:
    name, model, package = f"{backend}-int{bits}", subject.model, PACKAGES[backend]
    heads, dim = kv_size(model.config, 0)
    if heads * dim % GROUP:
        raise ConfigError(f"method {name!r}: the model has {heads} KV heads of size {dim}; expected a product that is a multiple of {GROUP}, the group size")
    try:
        trial = _make(model, backend, bits)
    except ImportError as error:
        raise ConfigError(f"method {name!r} needs a package: pip install {package}") from error
    except ValueError as error:
        raise ConfigError(f"method {name!r}: transformers' QuantizedCache does not take this model ({error}); leave the method out") from error
    probe = torch.linspace(-1, 1, heads * 8 * dim, dtype=model.dtype, device=model.device).reshape(1, heads, 8, dim)
    try:
        for _ in range(2):  # the second update decodes
            trial.update(probe, probe, 0)
    except (RuntimeError, OSError, ImportError, SubprocessError) as error:
        need = "; it compiles code on first use and needs ninja, a C++ compiler and, on CUDA, nvcc" if backend == "quanto" else ""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"method {name!r}: {package} does not run on {model.device} here ({reason}){need}") from error
    return Prepared(lambda: _make(model, backend, bits), stored_bits, residual_tokens)


def _make(model: PreTrainedModel, backend: str, bits: int) -> QuantizedCache:
    axis = AXES[backend]
    cache = QuantizedCache(backend, model.config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=GROUP, residual_length=RESIDUAL)
    if backend == "hqq":
        for layer in cache.layers:
            layer.quantizer = _PaddedHqq(layer.quantizer)  # pyright: ignore[reportAttributeAccessIssue]
    return cache


def stored_bits(cache: Cache) -> float:
    """Bits per element of what is coded: all tensors of the codes, float ones at 16 bits."""
    stored = elements = 0
    for layer in cache.layers:
        for coded in (layer._quantized_keys, layer._quantized_values):  # pyright: ignore[reportAttributeAccessIssue]
            stored += sum(t.numel() * (16 if t.is_floating_point() else 8 * t.element_size()) for t in _tensors(coded))
            elements += math.prod(coded[1]["unpadded"] if isinstance(coded, tuple) else coded.shape)
    return stored / elements


def _tensors(coded: Any) -> Iterator[Tensor]:
    """Plain tensors behind what a backend made: (codes, dictionary) of HQQ, or quanto's nested tensor subclasses."""
    if isinstance(coded, tuple):
        codes, meta = coded
        yield codes
        yield from (value for value in meta.values() if isinstance(value, Tensor))
    elif hasattr(coded, "__tensor_flatten__"):
        for name in coded.__tensor_flatten__()[0]:
            yield from _tensors(getattr(coded, name))
    else:
        yield coded


def residual_tokens(cache: Cache) -> int:
    """Tokens of one layer that are not coded yet. An emptied residual has no token dimension."""
    keys = cache.layers[0].keys  # pyright: ignore[reportAttributeAccessIssue]
    return keys.shape[-2] if keys is not None and keys.dim() == 4 else 0


def _quantized(backend: str, bits: int) -> Method:
    shown = {"quanto": "quanto", "hqq": "HQQ"}[backend]
    label = f"transformers QuantizedCache, {shown} int{bits}"
    return Method(f"{backend}-int{bits}", label, f"QuantizedCache, {shown}", False, lambda subject: _prepare(subject, backend, bits))


METHODS = tuple(_quantized(backend, bits) for backend in PACKAGES for bits in (4, 2))
