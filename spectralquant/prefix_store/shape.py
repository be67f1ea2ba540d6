"""Which entries a cache can take."""

from dataclasses import dataclass

import torch

from spectralquant.cache.file import read_dtype
from spectralquant.cache.hf import SpectralCache
from spectralquant.cache.layers import SpectralLayer
from spectralquant.cache.state import coded_indices, require_savable
from spectralquant.codec.layout import UNIT
from spectralquant.compat import placeholders
from spectralquant.config import CacheConfig
from spectralquant.errors import ConfigError
from spectralquant.prefix_store.entries import Layers
from spectralquant.prefix_store.names import root_name


@dataclass(frozen=True, slots=True)
class StoredShape:
    """What entries that a cache can take have in common.

    Attributes:
        root: Their folder's name.
        layers: The cache's coded layers.
        config: What stays exact.
        dtype, half: Of the model, and of exact tokens.
        coded_only: No other layer keeps anything.
    """

    root: str
    layers: Layers
    config: CacheConfig
    dtype: torch.dtype
    half: torch.dtype
    coded_only: bool

    @classmethod
    def of(cls, cache: SpectralCache) -> "StoredShape":
        require_savable(cache, coded_indices(cache))
        if cache.identity is None:
            raise ConfigError("the cache knows no model; make it with engine.cache(model)")
        dtype = read_dtype({"dtype": cache.identity.dtype})
        layers = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, SpectralLayer)}
        first = next(iter(layers.values()))
        heads = {i: layer.codec.heads for i, layer in layers.items()}
        shape = Layers(heads, first.codec.head_dim, first.codec.layout)
        coded_only = all(empty or type(layer) is SpectralLayer for layer, empty in zip(cache.layers, placeholders(cache), strict=True))
        return cls(root_name(cache.identity, first.config), shape, first.config, dtype, first.codec.exact_dtype_for(dtype), coded_only)

    def packed_of(self, length: int) -> int:
        """Blocks that can be taken without a tail where a text has so many tokens: those that its reading would leave packed."""
        return max(length - self.config.window, 0) // UNIT if self.coded_only else 0
