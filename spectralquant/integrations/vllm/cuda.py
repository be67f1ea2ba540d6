"""The backend on NVIDIA GPUs, which `--attention-backend CUSTOM` chooses. Layers that are not packed have FlashAttention."""

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from spectralquant.backend import MIN_CAPABILITY
from spectralquant.codec.budget import require_head_dim
from spectralquant.codec.layout import UNIT
from spectralquant.errors import ShapeError
from spectralquant.integrations.vllm.backend import builder, implementation, is_packed, packed_spec


def stock() -> type[AttentionBackend]:
    """The backend of layers that are not packed."""
    return AttentionBackendEnum.FLASH_ATTN.get_class()


class CudaBackend(AttentionBackend):
    """Packed pages where layers see all tokens before."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name

    @staticmethod
    def get_impl_cls() -> Any:
        return implementation(stock())

    @staticmethod
    def get_builder_cls() -> Any:
        return builder(stock())

    @staticmethod
    def get_supported_kernel_block_sizes(*spec: Any) -> list[Any]:  # vLLM 0.29 gives none
        return [UNIT] if all(map(is_packed, spec)) else stock().get_supported_kernel_block_sizes(*spec)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return packed_spec(spec) if is_packed(spec) else stock().customize_spec(spec)

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        return stock().supported_kv_cache_layouts()

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        try:
            require_head_dim(head_size)
        except ShapeError:
            return False
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return (capability.major, capability.minor) >= MIN_CAPABILITY

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return stock().supports_attn_type(attn_type)
