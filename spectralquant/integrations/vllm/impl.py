"""Attention of one layer in vLLM: `PagedLayer` behind vLLM's interface."""

from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl

from spectralquant.errors import UnsupportedModelError
from spectralquant.integrations.vllm.metadata import PagedMetadata
from spectralquant.integrations.vllm.setup import Setup, current_config, setup_of
from spectralquant.paged.layer import PagedLayer, Scoring

WITHOUT = "serve the model without spectralquant"


class PagedAttention(AttentionImpl[PagedMetadata]):
    """A layer that reads and writes packed pages. Arguments as vLLM's.

    Raises:
        UnsupportedModelError: The layer does what codes can't; the text names it.
        CalibrationError, ProfileError: See `setup_of`.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        if alibi_slopes is not None:
            raise UnsupportedModelError("the model adds ALiBi slopes to its logits, which attention on codes doesn't know; " + WITHOUT)
        if kv_sharing_target_layer_name is not None:
            raise UnsupportedModelError(f"a layer reads the cache of {kv_sharing_target_layer_name}; {WITHOUT}")
        if others:
            raise UnsupportedModelError(f"the model asks its attention for {', '.join(sorted(others))}, which packed pages don't have; {WITHOUT}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.scoring = Scoring(scale, logits_soft_cap or None, sinks)
        self.setup: Setup = setup_of(current_config())
        self.layer: PagedLayer | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM's call at the end of loading: what is taken now counts as the model's when it looks how much is left for pages. It doesn't say which
        layer this is, so the first of them prepares all."""
        config = current_config()
        for name, layer in config.compilation_config.static_forward_context.items():
            own = getattr(layer, "impl", None)
            if isinstance(own, PagedAttention) and own.layer is None:
                own.prepare(name, config.model_config.dtype)

    def prepare(self, layer_name: str, dtype: torch.dtype) -> None:
        """Take memory for the exact copies."""
        index = extract_layer_index(layer_name)
        if index not in self.setup.codecs:
            raise UnsupportedModelError(f"calibration {self.setup.file} has nothing for layer {index} ({layer_name}); calibrate this model again")
        options = self.setup.options
        average = _over_ranks if self.setup.ranks > 1 else None
        self.layer = PagedLayer(self.setup.codecs[index], dtype, options.exact_per_page, options.sinks, self.setup.copies, average=average)

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Write new keys and values [N, H, D]."""
        metadata = _metadata_of(layer)
        if metadata is not None:
            self._paged.store(_pages(kv_cache), key[: metadata.tokens], value[: metadata.tokens], metadata.step)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of queries [N, H G, D] into `output`; see vLLM's `AttentionImpl.forward`."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedModelError("vLLM asks for quantized attention output, which packed pages don't give; leave output quantization out")
        if attn_metadata is None:  # memory is being measured
            return output.fill_(0)
        n = attn_metadata.tokens
        self._paged.attend(
            query[:n], key[:n], value[:n], _pages(kv_cache), attn_metadata.step, self.scoring, output[:n].view(n, self.num_heads, self.head_size)
        )
        return output

    @property
    def _paged(self) -> PagedLayer:
        if self.layer is None:
            raise RuntimeError("vLLM runs a layer that it has not finished loading")
        return self.layer


def _over_ranks(x: Tensor) -> Tensor:
    """Mean over the ranks of the tensor-parallel group."""
    return tensor_model_parallel_all_reduce(x) / get_tensor_model_parallel_world_size()


def _metadata_of(layer: Any) -> PagedMetadata | None:
    """Of this layer in the step that runs."""
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):  # micro-batches
        metadata = metadata[0]
    return metadata[layer.layer_name] if isinstance(metadata, dict) else metadata


def _pages(kv_cache: Tensor) -> Tensor:
    """[pages, page_bytes] of the view [pages, 1, 128, bytes per token] that vLLM has."""
    return kv_cache.view(torch.uint8).view(kv_cache.shape[0], -1)
