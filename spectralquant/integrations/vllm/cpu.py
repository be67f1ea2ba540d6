"""The backend on CPUs, which is vLLM's own unless packed pages were asked for."""

from typing import Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from spectralquant.codec.layout import UNIT
from spectralquant.integrations.vllm.backend import builder, implementation, is_packed, packed_spec
from spectralquant.integrations.vllm.options import read_options
from spectralquant.integrations.vllm.setup import current_config


def is_asked_for() -> bool:
    """Whether vLLM was told to use us: its CPU platform takes no backend by name."""
    config = current_config()
    if config is None:
        return False
    return config.attention_config.backend == AttentionBackendEnum.CUSTOM or read_options(config.additional_config) is not None


class CpuBackend(CPUAttentionBackend):
    """vLLM's CPU attention, with packed pages where layers see all tokens before."""

    @staticmethod
    def get_impl_cls() -> Any:
        stock = CPUAttentionBackend.get_impl_cls()
        return implementation(CPUAttentionBackend) if is_asked_for() else stock

    @staticmethod
    def get_builder_cls() -> Any:
        stock = CPUAttentionBackend.get_builder_cls()
        return builder(CPUAttentionBackend) if is_asked_for() else stock

    @staticmethod
    def get_supported_kernel_block_sizes(*spec: Any) -> list[Any]:  # vLLM 0.29 gives none
        packed = is_asked_for() and all(map(is_packed, spec))
        return [UNIT] if packed else CPUAttentionBackend.get_supported_kernel_block_sizes(*spec)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return packed_spec(spec) if is_asked_for() and is_packed(spec) else super().customize_spec(spec)
