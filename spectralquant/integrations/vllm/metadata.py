"""What vLLM says of a batch, once per step and group of layers, as `paged.recent.Step`."""

from dataclasses import dataclass
from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata

from spectralquant.backend import resolve_backend
from spectralquant.integrations.vllm.setup import device_of, setup_of
from spectralquant.paged.held_step import HeldStep
from spectralquant.paged.recent import RecentPages, Step


@dataclass
class PagedMetadata(AttentionMetadata):
    """Of a batch.

    Attributes:
        tokens: New tokens; tensors may have more rows.
        step: See `Step`.
    """

    tokens: int
    step: Step


class PagedMetadataBuilder(AttentionMetadataBuilder[PagedMetadata]):
    """Keeps account of the exact copies of its group of layers, which have their pages in common.

    A step of one token per sequence is a fixed sequence of launches on tensors that stay where they are, so vLLM may capture it.
    """

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        runs = resolve_backend("auto", device_of(vllm_config)).name == "cuda"
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if runs else AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        scheduler = vllm_config.scheduler_config
        self._held = HeldStep(scheduler.max_num_seqs, max(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)) if device.type == "cuda" else None
        self._recent: RecentPages | None = None

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> PagedMetadata:
        batch = common_attn_metadata
        pages = self.vllm_config.compilation_config.static_forward_context[self.layer_names[0]].kv_cache.shape[0]
        if self._recent is None or self._recent.pages != pages:  # there are few while vLLM measures memory
            self._recent = RecentPages(setup_of(self.vllm_config).copies, pages, self.device)
        rows, tokens = batch.num_reqs, batch.num_actual_tokens
        starts, after = batch.query_start_loc[: rows + 1], batch.seq_lens[:rows]
        before = (after - starts.diff()).clamp_min(0)  # rows that only pad a batch have a query and no tokens
        step = self._recent.advance(batch.block_table_tensor[:rows], before, after, starts, batch.slot_mapping[:tokens], batch.max_query_len)
        return PagedMetadata(tokens, step if self._held is None else self._held.hold(step))
