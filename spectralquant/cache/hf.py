"""HuggingFace form of the cache: transformers' `Cache` with coded layers (`layers.py`) where a layer grows with the text, transformers' own elsewhere."""

import os
from collections.abc import Iterable
from copy import deepcopy
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from spectralquant.cache.file import Identity, read_cache, write_cache
from spectralquant.cache.layers import CODED, SpectralLayer, all_or_nothing, coded_layer, has_states
from spectralquant.cache.state import capture_cache, restore_cache
from spectralquant.codec.codec import LayerCodec, codec_nbytes
from spectralquant.codec.packed import plain_arithmetic
from spectralquant.compat import INSTALLED, KEEPS_RECURRENT_STATES, STATES_SINCE, UNCROPPABLE, cache_argument, layer_config, placeholders, reset_layer
from spectralquant.config import CacheConfig
from spectralquant.errors import CacheFileError, ConfigError, ShapeError, UnsupportedModelError
from spectralquant.tensor_file import with_suffix


class SpectralCache(DynamicCache):
    """A cache for `model.generate(..., past_key_values=cache)` that stores packed codes.

    Args:
        model_config: The model's configuration.
        codecs: Layer index -> codec, from `codec.codec.build_codec`.
        config: What stays exact.
        identity: Fingerprints of the model and codec that the cache is for: `generate` of another model refuses it, and so does `load`. None: not known.
        devices: Layer index -> where the layer runs, for what a file brings; left out, where the nearest codec is.

    Attributes:
        prefix_ids: Token ids [1, T] of a prefix that this cache holds for any number of follow-ups, or None. `generate` of a model
            that an engine was applied to works on a copy of such a cache.
        window_sizes: Layer index -> KV heads and head size, of layers with a sliding window.
        decode_report: How the steps of the last `generate` ran, a `decode_graph.DecodeReport`; None before.

    Raises:
        UnsupportedModelError: A calibrated layer does not grow in this model.
    """

    def __init__(
        self,
        model_config: PretrainedConfig,
        codecs: dict[int, LayerCodec],
        config: CacheConfig | None = None,
        identity: Identity | None = None,
        devices: dict[int, torch.device] | None = None,
    ) -> None:
        layers = dense_layers(model_config)
        for index in codecs:
            if index >= len(layers) or type(layers[index]) not in CODED:
                raise UnsupportedModelError(f"layer {index} of this model is no growing attention layer, the calibration has one; calibrate this model")
        config = config or CacheConfig()
        Cache.__init__(self, layers=[coded_layer(layer, codecs[i], config) if i in codecs else layer for i, layer in enumerate(layers)])
        self.identity = identity
        self._devices = {} if devices is None else devices
        self.window_sizes: dict[int, tuple[int, int]] = {i: kv_size(model_config, i) for i, layer in enumerate(layers) if getattr(layer, "is_sliding", False)}
        self.prefix_ids: Tensor | None = None
        self.decode_report: Any = None
        self._behind: SpectralLayer | None = None  # whose update came last

    @property
    def coded_layers(self) -> list[SpectralLayer]:
        return [layer for layer in self.layers if isinstance(layer, SpectralLayer)]

    def device_of(self, index: int) -> torch.device:
        """Where a layer runs."""
        if index in self._devices:
            return self._devices[index]
        coded = {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, SpectralLayer)}
        return coded[min(coded, key=lambda i: abs(i - index))].codec.value_norm.device

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
        with all_or_nothing([layer]):
            out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(layer, SpectralLayer):
            behind, self._behind = self._behind, layer
            if behind is not None and behind is not layer:
                behind.finish()  # while the device works on this layer
        return out

    def crop(self, tokens_to_remove: int) -> None:
        with all_or_nothing(self.layers):
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        with all_or_nothing(self.layers):
            super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]

    def batch_repeat_interleave(self, repeats: int) -> None:
        with all_or_nothing(self.layers):
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        with all_or_nothing(self.layers):
            super().batch_select_indices(indices)

    def reset(self) -> None:
        """Drop all tokens."""
        self._behind = None
        for layer in self.layers:
            reset_layer(layer)

    def roll_back(self, length: int) -> None:
        """Go back to the first `length` tokens, from whatever state a forward pass that failed has left. Layers whose window has slid on can't: then
        the cache is empty afterwards, and the next `generate` reads the whole text anew."""
        layers: list[Any] = [layer for layer, empty in zip(self.layers, placeholders(self), strict=True) if not empty]
        whole = length > 0 and not any(has_states(layer) for layer in layers)  # recurrent states don't go back
        try:
            for layer in layers if whole else ():
                if layer.get_seq_length() > length:
                    layer.crop(length - layer.get_seq_length())
                whole = whole and layer.get_seq_length() == length
        except UNCROPPABLE:
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

    def expect(self, length: int | None) -> None:
        """There will be `length` tokens at most, so stores need no room for more in advance; None: not known. `generate` says it."""
        for layer in self.coded_layers:
            layer.expect(length)

    def fill(self, dense: DynamicCache) -> None:
        """Take over the content of an uncompressed cache of the same model; this cache must be empty. Layers that are not coded are shared."""
        if self.get_seq_length():
            raise ConfigError(f"the cache holds {self.get_seq_length()} tokens; only an empty one can take over another cache")
        layers: list[Any] = list(dense.layers)
        with all_or_nothing(self.layers):
            for mine, other in zip(self.layers, layers, strict=True):
                if isinstance(mine, SpectralLayer):
                    mine.take_over(other)
        self.layers = [mine if isinstance(mine, SpectralLayer) else other for mine, other in zip(self.layers, layers, strict=True)]

    def save(self, path: str | os.PathLike[str], token_ids: Tensor | None = None) -> Path:
        """Write everything held to one `.safetensors` file, aside and renamed: codes, exact tokens, window, positions, and fingerprints of model and codec.

        Args:
            path: The file; the suffix is added if it is missing. The old one stays until the new one is whole.
            token_ids: [1, T] int64, the text that is held; left out, those of a prefix (`prefix_ids`). With them `load` gives a prefix for any number of
                follow-ups, without them a cache that a call of `generate` goes on with.

        Returns:
            The path.

        Raises:
            ConfigError: The cache is empty, was not made by an engine, or holds another text than `token_ids`.
            UnsupportedModelError: The model has layers of a kind that can't be saved.
            OSError: The file can't be written.
        """
        length, coded = self.get_seq_length(), self.coded_layers
        if not length or self.identity is None:
            raise ConfigError("the cache is empty: run the model first" if not length else "the cache knows no model: make it with engine.cache(model)")
        ids = self.prefix_ids if token_ids is None else torch.as_tensor(token_ids)
        with plain_arithmetic(torch.device("cpu")):
            state = capture_cache(self)
        if ids is not None and (ids.dtype != torch.int64 or tuple(ids.shape) != (1, length) or state.batch != 1):
            raise ConfigError(f"token_ids is {ids.dtype} {tuple(ids.shape)}, expected torch.int64 (1, {length}), what one sequence holds")
        target = with_suffix(path)
        write_cache(target, state, ids, coded[0].config, self.identity)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel, engine: Any) -> "SpectralCache":
        """The cache in a file of `save`. It decodes as the saved one would have; on a CPU packed codes stay in the file, mapped into memory.

        Args:
            path: The file; the suffix is added if it is missing.
            model: The model that it was made with, on any device.
            engine: A `SpectralQuantEngine`, or a `SpectralQuant`, with the calibration, preset and quantizer that it was made with. What stays exact
                (sinks, window) is the file's.

        Raises:
            CacheFileError: The file is missing, damaged, of another version, or made with another model, calibration or preset.
        """
        cache: SpectralCache = engine.cache(model)
        assert cache.identity is not None
        target = with_suffix(path)
        state, ids, config = read_cache(target, cache.coded_layers[0].config, cache.identity)
        with plain_arithmetic(torch.device("cpu")):
            try:
                restore_cache(cache, state, config, cache.device_of)
            except CacheFileError as error:
                raise CacheFileError(f"{target} can't be used: {error}") from error
        cache.prefix_ids = None if ids is None else ids.to(model_device(model))
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held: codes, gains, exact tokens, window, slack, and layers that are not coded."""
        return storage_bytes(tensor for layer in self.layers for tensor in layer_tensors(layer))

    @property
    def codec_bytes(self) -> int:
        """Bytes of the codec's constants, which all caches of one model share."""
        return codec_nbytes(layer.codec for layer in self.coded_layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes that a 16-bit cache of the same tokens takes (sliding layers: what they hold)."""
        total = 0
        for layer in self.layers:
            held = layer_tensors(layer)
            segment = layer.segment if isinstance(layer, SpectralLayer) else None
            if segment is not None:
                batch, heads, _, dim = segment.recent_keys.shape
                total += 2 * 2 * batch * heads * segment.length * dim
                held = held[len(segment.tensors()) :]  # recurrent states
            total += sum(2 * tensor.numel() for tensor in held)
        return total

    def copy(self) -> "SpectralCache":
        """An independent cache with the same content; codec constants are shared."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._behind = None
        with plain_arithmetic(torch.device("cpu")):
            other.layers = [layer.copy() if isinstance(layer, SpectralLayer) else deepcopy(layer) for layer in self.layers]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpectralCache":
        return self.copy()


def dense_layers(model_config: PretrainedConfig) -> list[Any]:
    """transformers' own cache layers for this model, one per model layer; plain attention is `DynamicLayer`."""
    text = model_config.get_text_config(decoder=True)
    layers = list(DynamicCache(config=text).layers)
    count = getattr(text, "num_hidden_layers", 0)
    return layers if layers else [DynamicLayer() for _ in range(count)]


def kv_size(model_config: PretrainedConfig, index: int) -> tuple[int, int]:
    """KV heads of a layer and their size, as far as the configuration tells."""
    layer = layer_config(model_config.get_text_config(decoder=True), index)
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    return heads, getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


def coded_layer_indices(model: PreTrainedModel) -> list[int]:
    """Indices of the layers that grow with the text, the ones that are worth coding.

    Raises:
        UnsupportedModelError: There is none, or what they cache are no keys and values, or transformers keeps them elsewhere. The text names the layers.
    """
    name, text = type(model).__name__, model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"all decoder layers of {name} attend to an encoder as well, which calibration has no input for; decoder-only models can be compressed"
        )
    if not getattr(text, "num_attention_heads", None):
        raise UnsupportedModelError(f"{name} has no attention heads: there is nothing to compress")
    layers = dense_layers(model.config)
    grow = [i for i, layer in enumerate(layers) if type(layer) in CODED]
    if model._is_stateful and not KEEPS_RECURRENT_STATES:  # pyright: ignore[reportPrivateUsage]
        raise UnsupportedModelError(f"{INSTALLED} keeps all layers of {name} in a cache of its own kind; {STATES_SINCE} or later has one kind for all")
    if not grow:
        raise UnsupportedModelError(f"{name} has no attention layer that grows with the text, so there is nothing to compress: {_bounded(layers)}")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"layer {grow[0]} of {name} is multi-head latent attention: it caches latents, compressed by the model itself, in the place of keys and values"
        )
    return grow


def _bounded(layers: list[Any]) -> str:
    """What layers that don't grow keep, in words: "layers 0-31 keep a sliding window of 4096 tokens"."""
    kept = [f"a sliding window of {layer.sliding_window} tokens" if getattr(layer, "is_sliding", False) else "recurrent states" for layer in layers]
    runs = [list(run) for _, run in groupby(range(len(layers)), key=kept.__getitem__)]
    return ", ".join(f"layers {run[0]}-{run[-1]} keep {kept[run[0]]}" if len(run) > 1 else f"layer {run[0]} keeps {kept[run[0]]}" for run in runs)


@torch.no_grad()
def read_dense(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> DynamicCache:
    """The uncompressed cache of ids [B, T]; `mask` [B, T]: 0 for padding on the left."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    options = {} if mask is None else {"attention_mask": mask}
    model.base_model(input_ids=ids, use_cache=True, **options, **cache_argument(model, cache))
    return cache


def layer_tensors(layer: Any) -> list[Tensor]:
    """All tensors that a layer of a cache holds, of this package or of transformers."""
    if isinstance(layer, SpectralLayer):
        return layer.tensors()
    held = [x for v in vars(layer).values() for x in (v.values() if isinstance(v, dict) else (v,))]  # recurrent states are in dicts
    return [x for x in held if isinstance(x, Tensor)]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages that tensors lie in, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def layer_devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Layer index -> where its attention runs, which differs between layers of a model that was loaded with a `device_map`."""
    everywhere = {parameter.device for parameter in model.parameters()}
    if len(everywhere) == 1 and torch.device("meta") not in everywhere:
        return dict.fromkeys(range(len(dense_layers(model.config))), everywhere.pop())
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
