"""HuggingFace form of the cache: every override of transformers' `Cache` and its layers, for transformers 4.56 to 5.x.

Only plain growing layers are replaced; sliding-window, recurrent and placeholder layers keep transformers' own (they are
bounded already). The interface moved between releases; each shim says which.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from spectralquant.cache.segment import Segment, use_kernels
from spectralquant.codec.codec import LayerCodec, codec_nbytes
from spectralquant.codec.packed import LazyKV
from spectralquant.config import CacheConfig
from spectralquant.errors import ConfigError, UnsupportedModelError


class SpectralLayer(CacheLayerMixin):
    """One coded layer. `update` returns the raw tensors on an empty layer (prefill attends in full precision) and LazyKV after."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, codec: LayerCodec, config: CacheConfig) -> None:
        super().__init__()
        self.codec, self.config = codec, config
        self.segment: Segment | None = None
        self.padding: Tensor | None = None
        self.is_initialized = False  # the base class of 4.56 does not set it
        self.stepping = False  # whether `update` takes one token per sequence for a CUDA graph, see `Segment.append`

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        batch = key_states.shape[0]
        start = torch.zeros(batch, dtype=torch.int64, device=key_states.device)
        if self.padding is not None:
            if batch % len(self.padding):
                raise ConfigError(f"the cache was told of {len(self.padding)} sequences and got a batch of {batch}")
            start = self.padding.to(key_states.device).repeat_interleave(batch // len(self.padding))
        self.segment = Segment(self.codec, self.config, key_states, start)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.segment is None:
            self.lazy_initialization(key_states, value_states)
        assert self.segment is not None
        if self.stepping:
            view = self.segment.append(key_states.detach(), value_states.detach())
            return LazyKV(view, "key"), LazyKV(view, "value")
        view = self.segment.update(key_states.detach(), value_states.detach())
        if view is None:
            return key_states, value_states
        return LazyKV(view, "key"), LazyKV(view, "value")

    def runs_kernels(self, device: torch.device) -> bool:
        """Whether attention over this layer on `device` is the fused kernel's."""
        return use_kernels(self.codec, self.config, device)

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self.segment is None else self.segment.length

    def get_mask_sizes(self, query_length: "int | Tensor") -> tuple[int, int]:
        if isinstance(query_length, Tensor):  # before 5.4: cache_position
            query_length = query_length.shape[0]
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before 5.14

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: remove that many tokens. Positive (before 5.15): the length to keep."""
        if self.segment is not None and tokens_to_remove:
            length = self.segment.length + tokens_to_remove if tokens_to_remove < 0 else tokens_to_remove
            self.segment.crop(max(length, 0))

    def reset(self) -> None:
        self.segment, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu"))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device))

    def _map(self, fn: Any) -> None:
        if self.segment is not None:
            self.segment.map_batch(fn)


class SpectralCache(DynamicCache):
    """A cache for `model.generate(..., past_key_values=cache)` that stores packed codes.

    Args:
        model_config: The model's configuration.
        codecs: Layer index -> codec, from `codec.codec.build_codec`.
        config: What stays exact.

    Attributes:
        prefix_ids: Token ids [1, T] of a prefix that this cache holds for any number of follow-ups, or None. `generate` of a model
            that an engine was applied to works on a copy of such a cache.

    Raises:
        UnsupportedModelError: A calibrated layer is not a plain growing layer in this model.
    """

    def __init__(self, model_config: PretrainedConfig, codecs: dict[int, LayerCodec], config: CacheConfig | None = None) -> None:
        layers = dense_layers(model_config)
        for index in codecs:
            if index >= len(layers) or type(layers[index]) is not DynamicLayer:
                raise UnsupportedModelError(f"layer {index} of this model is no plain attention layer, the calibration has one; calibrate this model")
        config = config or CacheConfig()
        Cache.__init__(self, layers=[SpectralLayer(codecs[i], config) if i in codecs else layer for i, layer in enumerate(layers)])
        self.prefix_ids: Tensor | None = None

    @property
    def coded_layers(self) -> list[SpectralLayer]:
        return [layer for layer in self.layers if isinstance(layer, SpectralLayer)]

    def set_padding(self, attention_mask: Tensor) -> None:
        """Tell an empty cache where each sequence starts, from a 2-D mask [B, T] with zeros on the left.

        Left padding shifts positions against slots. Results are right without this; codes are better with it.
        """
        start = attention_mask.bool().int().argmax(-1)
        for layer in self.coded_layers:
            layer.padding = start

    def fill(self, dense: DynamicCache) -> None:
        """Take over the content of an uncompressed cache of the same model; this cache must be empty. Layers that are not coded are shared."""
        if self.get_seq_length():
            raise ConfigError(f"the cache holds {self.get_seq_length()} tokens; only an empty one can take over another cache")
        layers: list[Any] = list(dense.layers)
        for i, (mine, other) in enumerate(zip(self.layers, layers, strict=True)):
            if isinstance(mine, SpectralLayer):
                mine.update(other.keys, other.values)
            else:
                self.layers[i] = other

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held: codes, gains, exact tokens, window, slack, and layers that are not coded."""
        return _storage_bytes(tensor for layer in self.layers for tensor in _layer_tensors(layer))

    @property
    def codec_bytes(self) -> int:
        """Bytes of the codec's constants, which all caches of one model share."""
        return codec_nbytes(layer.codec for layer in self.coded_layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes that a 16-bit cache of the same tokens takes (sliding layers: what they hold)."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, SpectralLayer):
                segment = layer.segment
                if segment is not None:
                    batch, heads, _, dim = segment.recent_keys.shape
                    total += 2 * 2 * batch * heads * segment.length * dim
            else:
                total += sum(2 * tensor.numel() for tensor in _layer_tensors(layer))
        return total

    def copy(self) -> "SpectralCache":
        """An independent cache with the same content; codec constants are shared."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layers = [_copy_layer(layer) for layer in self.layers]
        return other


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """`cache` under the name that this model's `forward` takes it by: `past_key_values` before transformers 5.24, `cache` since."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def dense_layers(model_config: PretrainedConfig) -> list[Any]:
    """transformers' own cache layers for this model, one per model layer; plain attention is `DynamicLayer`."""
    text = model_config.get_text_config(decoder=True)
    layers = list(DynamicCache(config=text).layers)
    count = getattr(text, "num_hidden_layers", 0)
    return layers if layers else [DynamicLayer() for _ in range(count)]


def coded_layer_indices(model: PreTrainedModel) -> list[int]:
    """Indices of the layers that grow with the text, the ones that are worth coding."""
    return [i for i, layer in enumerate(dense_layers(model.config)) if type(layer) is DynamicLayer]


def _layer_tensors(layer: Any) -> list[Tensor]:
    if isinstance(layer, SpectralLayer):
        return layer.segment.tensors() if layer.segment is not None else []
    return [v for v in vars(layer).values() if isinstance(v, Tensor)]


def _storage_bytes(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _copy_layer(layer: Any) -> Any:
    other = object.__new__(type(layer))
    other.__dict__.update(layer.__dict__)
    if isinstance(other, SpectralLayer):
        other.segment = other.segment.copy() if other.segment is not None else None
    else:
        other.__dict__.update({k: v.clone() for k, v in vars(layer).items() if isinstance(v, Tensor)})
    return other
