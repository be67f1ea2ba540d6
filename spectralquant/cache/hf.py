"""HuggingFace form of the cache: every override of transformers' `Cache` and its layers, for transformers 4.56 to 5.x.

Only plain growing layers are replaced; sliding-window, recurrent and placeholder layers keep transformers' own (they are
bounded already). The interface moved between releases; each shim says which.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from spectralquant.cache.segment import Segment, use_kernels
from spectralquant.codec.codec import LayerCodec, codec_nbytes
from spectralquant.codec.packed import LazyKV, plain_arithmetic, without_gradient
from spectralquant.config import CacheConfig
from spectralquant.errors import ConfigError, ShapeError, UnsupportedModelError

CANDIDATES = 128
"""Tokens of assisted decoding that may be refused at once without a trace in the cache. The window's buffer grows by as many when that many come."""


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
        self.record_past = False  # whether candidates may be refused, see `activate_past_recording`
        self.stepping = False  # whether `update` takes one token per sequence for a CUDA graph, see `Segment.append`

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        batch = key_states.shape[0]
        with plain_arithmetic(key_states.device):
            start = torch.zeros(batch, dtype=torch.int64, device=key_states.device)
            if self.padding is not None:
                if batch % len(self.padding):
                    raise ConfigError(f"the cache was told of {len(self.padding)} sequences and got a batch of {batch}")
                start = self.padding.to(key_states.device).repeat_interleave(batch // len(self.padding))
            self.segment = Segment(self.codec, self.config, key_states, start)
        self.segment.candidates = CANDIDATES if self.record_past else 0
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.segment is None:
            self.lazy_initialization(key_states, value_states)
        assert self.segment is not None
        if key_states.device != self.segment.records.device:
            self._follow(key_states.device)
        with plain_arithmetic(key_states.device):
            append = self.segment.append if self.stepping else self.segment.update
            view = append(key_states.detach(), value_states.detach())
        if view is None:
            return key_states, value_states
        key, value = without_gradient((LazyKV(view, "key"), LazyKV(view, "value")), (key_states, value_states))
        return key, value

    def _follow(self, device: torch.device) -> None:
        if device != self.device:
            raise ConfigError(f"keys are on {device} and the cache was made on {self.device}; make a new cache after moving a model")
        self.prefetch()

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
            with plain_arithmetic(self.segment.records.device):
                self.segment.crop(max(length, 0))

    def activate_past_recording(self) -> None:
        """From now on up to `CANDIDATES` tokens can be cropped after the update that brought them, as if they had never been there."""
        self.record_past = True
        if self.segment is not None:
            self.segment.candidates = CANDIDATES

    def reset(self) -> None:
        self.segment, self.padding, self.is_initialized = None, None, False

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
            with plain_arithmetic(self.segment.records.device):
                self.segment.map_batch(fn)


class SpectralCache(DynamicCache):
    """A cache for `model.generate(..., past_key_values=cache)` that stores packed codes.

    Args:
        model_config: The model's configuration.
        codecs: Layer index -> codec, from `codec.codec.build_codec`.
        config: What stays exact.
        weights: Fingerprint of the model that the cache is for; `generate` of another model refuses it. None: not known.

    Attributes:
        prefix_ids: Token ids [1, T] of a prefix that this cache holds for any number of follow-ups, or None. `generate` of a model
            that an engine was applied to works on a copy of such a cache.

    Raises:
        UnsupportedModelError: A calibrated layer is not a plain growing layer in this model.
    """

    def __init__(self, model_config: PretrainedConfig, codecs: dict[int, LayerCodec], config: CacheConfig | None = None, weights: str | None = None) -> None:
        layers = dense_layers(model_config)
        for index in codecs:
            if index >= len(layers) or type(layers[index]) is not DynamicLayer:
                raise UnsupportedModelError(f"layer {index} of this model is no plain attention layer, the calibration has one; calibrate this model")
        config = config or CacheConfig()
        Cache.__init__(self, layers=[SpectralLayer(codecs[i], config) if i in codecs else layer for i, layer in enumerate(layers)])
        self.weights = weights
        self.prefix_ids: Tensor | None = None

    @property
    def coded_layers(self) -> list[SpectralLayer]:
        return [layer for layer in self.layers if isinstance(layer, SpectralLayer)]

    @torch.compiler.disable
    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in `Cache`, outside of what torch.compile traces: where codes are written depends on the data.

        Raises:
            ShapeError: The model has more layers than the cache, or keys have another batch or head size.
            ConfigError: Layers hold different numbers of tokens, or keys are on another device.
        """
        if layer_idx >= len(self.layers):
            raise ShapeError(f"layer {layer_idx} asks for its cache, which was made for a model of {len(self.layers)} layers; make it with engine.cache(model)")
        layer, first = self.layers[layer_idx], next((x for x in self.layers if isinstance(x, SpectralLayer)), None)
        if first is not None and first.segment is not None:
            first.segment.require_batch(len(key_states))  # layers of transformers may come before
        if isinstance(layer, SpectralLayer) and first is not None and layer is not first and not layer.stepping:
            held, others = layer.get_seq_length(), first.get_seq_length() - key_states.shape[-2]
            if held != others:
                raise ConfigError(f"layer {layer_idx} holds {held} tokens, others {others}: a forward pass was interrupted; call cache.roll_back(length)")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def roll_back(self, length: int) -> None:
        """Go back to the first `length` tokens, from whatever state a forward pass that failed has left. Layers whose window has slid on can't: then
        the cache is empty afterwards, and the next `generate` reads the whole text anew."""
        dummies = getattr(self, "is_dummy", [False] * len(self.layers))  # layers without a cache, since transformers 5.23
        layers: list[Any] = [layer for layer, dummy in zip(self.layers, dummies, strict=True) if not dummy]
        whole = length > 0 and all(isinstance(layer, CacheLayerMixin) for layer in layers)  # recurrent states don't go back
        try:
            for layer in layers if whole else ():
                if layer.get_seq_length() > length:
                    layer.crop(length - layer.get_seq_length())
                whole = whole and layer.get_seq_length() == length
        except (NotImplementedError, RuntimeError):  # what transformers' layers raise that can't be cropped
            whole = False
        if not whole:
            self.reset()

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
        with plain_arithmetic(torch.device("cpu")):
            other.layers = [_copy_layer(layer) for layer in self.layers]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpectralCache":
        return self.copy()


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
        other.__dict__.update(tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, dict(vars(layer))))
    return other


def layer_devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Layer index -> where its attention runs, which differs between layers of a model that was loaded with a `device_map`."""
    found: dict[int, torch.device] = {}
    for module in model.modules():
        index, device = getattr(module, "layer_idx", None), _device_of(module)
        if isinstance(index, int) and device is not None:
            found.setdefault(index, device)
    return found


def model_device(model: PreTrainedModel) -> torch.device:
    """Where inputs go: the model's device, or that of its first layer if its first weights are offloaded."""
    return model.device if model.device.type != "meta" else layer_devices(model).get(0, torch.device("cpu"))


def _device_of(module: Any) -> torch.device | None:
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)  # accelerate's: the weights may be elsewhere between two passes
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
        own = next(part.parameters(recurse=False), None)
        if own is not None and own.device.type != "meta":
            return own.device
    return None
