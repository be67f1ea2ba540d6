"""Which layers have packed pages: decoder attention over everything before. Layers with a sliding window, and encoders, keep the platform's own backend."""

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from spectralquant.integrations.vllm.impl import PagedAttention
from spectralquant.integrations.vllm.metadata import PagedMetadataBuilder
from spectralquant.integrations.vllm.setup import current_config, setup_of


def is_packed(spec: Any) -> bool:
    """Whether a layer with this spec of vLLM's has packed pages."""
    return type(spec) is FullAttentionSpec and spec.sliding_window is None


def implementation(stock: type[AttentionBackend]) -> Any:
    """The class that makes a layer's implementation, packed or of the backend `stock`."""

    class Implementation(stock.get_impl_cls()):
        """Makes one of two; has the class attributes that vLLM looks at."""

        supports_pcp = supports_dcp = False

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            window, kind = (kwargs.get(name, args[at] if len(args) > at else None) for name, at in (("sliding_window", 5), ("attn_type", 8)))
            packed = window is None and kind in (None, "decoder")
            return (PagedAttention if packed else stock.get_impl_cls())(*args, **kwargs)

    return Implementation


def builder(stock: type[AttentionBackend]) -> Any:
    """The class that makes a group's metadata builder, packed or of the backend `stock`."""

    class Builder(stock.get_builder_cls()):
        """Makes one of two; has the class attributes that vLLM looks at."""

        def __new__(cls, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> Any:
            return cls.of(kv_cache_spec)(kv_cache_spec, *args, **kwargs)

        @staticmethod
        def of(kv_cache_spec: Any) -> Any:
            return PagedMetadataBuilder if is_packed(kv_cache_spec) else stock.get_builder_cls()

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            return cls.of(kv_cache_spec).get_cudagraph_support(vllm_config, kv_cache_spec)

    return Builder


def packed_spec(spec: Any) -> Any:
    """The spec of a packed layer: pages of 128 tokens, opaque bytes, all heads together."""
    if spec.state_content_bytes is not None:
        return spec
    return replace(spec, dtype=torch.uint8, num_head_slots=1, state_content_bytes=setup_of(current_config()).layout.bytes_per_token)
