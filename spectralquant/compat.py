"""What differs between transformers 4.56 and the newest release, all of it. Other files ask no release for its version; each item says when it changed."""

import inspect
from typing import Any

from packaging.version import Version
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, __version__, cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

INSTALLED = f"transformers {__version__}"

CACHE_ARGUMENTS = ("past_key_values", "cache")
"""Names of the cache in `forward` and `generate`: before 5.24, and since."""


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """`cache` under the name that this model's `forward` takes it by."""
    before, since = CACHE_ARGUMENTS
    return {since if since in inspect.signature(model.forward).parameters else before: cache}


def last_logits(model: PreTrainedModel) -> dict[str, int]:
    """Options of `forward` by which it computes the last position's logits alone, where the model knows how to."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def reset_layer(layer: Any) -> None:
    """Empty `layer`; transformers' own that grow keep zeros at `reset`, before 5.18."""
    layer.reset()
    if isinstance(layer, DynamicLayer):
        layer.keys, layer.values, layer.is_initialized = None, None, False


def fitted_mask(mask: Tensor | None, keys: int) -> Tensor | None:
    """`mask` [..., T] without what is beyond the keys: StableLM of 5.0 has a column too many, which transformers' own attention cuts off."""
    return mask[..., :keys] if mask is not None and mask.shape[-1] > keys else mask


ASSISTED_READS_ALL = "next_sequence_length" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters  # pyright: ignore
"""Whether assisted decoding puts the whole text behind what a cache holds of it, with any cache: since `generate` tells a model how many tokens are new."""

PIECES_READ_ALL = Version(__version__) < Version("5.23")
"""Whether `prefill_chunk_size` puts the whole text behind what a cache holds of it, with any cache."""

UNCROPPABLE = (NotImplementedError, RuntimeError, ValueError)
"""What layers of transformers raise that can't be cropped; ValueError before 5.15."""


class LayerInterface(CacheLayerMixin):
    """The interface of a cache's layer that grows, in the form of every release. A layer has `get_seq_length` and `keep`."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = False  # 4.56 does not set it

    def keep(self, length: int) -> None:
        """Drop what comes after the first `length` tokens."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: "int | Tensor") -> tuple[int, int]:
        if isinstance(query_length, Tensor):  # before 5.4: cache_position
            query_length = query_length.shape[0]
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before 5.14

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: remove that many tokens. Positive (before 5.15): the length to keep."""
        if tokens_to_remove:
            self.keep(max(self.get_seq_length() + tokens_to_remove, 0) if tokens_to_remove < 0 else tokens_to_remove)


KEEPS_RECURRENT_STATES = hasattr(cache_utils, "LinearAttentionAndFullAttentionLayer")
"""Whether transformers' layers keep recurrent states, with attention in one layer too (Falcon-H1); before 5.4 such models bring caches of their own."""
STATES_SINCE = "transformers 5.4"
STATES = ("conv_states", "recurrent_states")
"""Tensors, or dicts of several in later releases."""

STATE_FLAGS = ("has_previous_state", "is_conv_states_initialized", "is_recurrent_states_initialized", "conv_kernel_size")
"""Flags and sizes beside them, those that the release has: values, or dicts of several."""
RECURRENT: tuple[type, ...] = tuple(getattr(cache_utils, name) for name in ("LinearAttentionCacheLayerMixin",) if hasattr(cache_utils, name))
"""Layers with such states."""

RECURRENT_IS_CROPPABLE: Any = getattr(getattr(cache_utils, "LinearAttentionLayer", None), "is_croppable", False)
"""Not known before 5.17."""


def state_options(layer: Any) -> dict[str, Any]:
    """What a layer like transformers' `layer` is made with."""
    return {"number_of_states": layer.number_of_states} if hasattr(layer, "number_of_states") else {}


def state_tensors(layer: Any) -> list[Tensor]:
    """Recurrent states that `layer` holds by now."""
    held = (getattr(layer, name) for name in STATES)
    return [t for x in held for t in (x.values() if isinstance(x, dict) else (x,)) if t is not None]


def placeholders(cache: Cache) -> list[bool]:
    """For each layer whether it keeps nothing, since 5.23."""
    return list(getattr(cache, "is_dummy", [False] * len(cache.layers)))


def layer_config(text: PretrainedConfig, index: int) -> Any:
    """The configuration of one layer: in later releases than 5.0 layers may differ (Gemma 4)."""
    return text.per_layer_config[index] if hasattr(text, "per_layer_config") else text  # pyright: ignore[reportAttributeAccessIssue]
