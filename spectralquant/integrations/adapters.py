"""Adapters for attention modules that do their own products."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spectralquant.integrations.calls import AttentionAdapter, AttentionCall, heads_apart, heads_merged


@dataclass(frozen=True, slots=True)
class ProjectionAdapter:
    """Modules whose forward is project, attend, project: `forward(hidden, mask=None)` with hidden [B, T, C] gives [B, T, C].

    Attributes:
        kind: Name of the modules' class.
        query, key, value, output: Names of their projections; `query` alone, for all three in this order, where `key` and `value` are empty.
        heads: Name of the attribute that says how many heads there are.
        scale: Factor of the logits; None: D^-1/2.
    """

    kind: str
    query: str
    key: str = ""
    value: str = ""
    output: str = ""
    heads: str = "num_heads"
    scale: float | None = None

    def takes(self, module: nn.Module) -> bool:
        return type(module).__name__ == self.kind

    def call(self, module: nn.Module, hidden: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> AttentionCall:
        heads = getattr(module, self.heads)
        if self.key:
            states = [getattr(module, name)(hidden) for name in (self.query, self.key, self.value)]
        else:
            states = getattr(module, self.query)(hidden).chunk(3, -1)
        query, key, value = (heads_apart(x, heads) for x in states)
        return AttentionCall(query, key, value, mask, query.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def result(self, module: nn.Module, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        merged = heads_merged(out)
        return getattr(module, self.output)(merged) if self.output else merged


class TimesformerAdapter:
    """transformers' TimesformerSelfAttention: one projection for all three, the output's is outside; a tuple comes back."""

    _projections = ProjectionAdapter("TimesformerSelfAttention", "qkv")

    def takes(self, module: nn.Module) -> bool:
        return self._projections.takes(module)

    def call(self, module: nn.Module, hidden_states: Tensor, output_attentions: bool = False) -> AttentionCall:
        return self._projections.call(module, hidden_states)

    def result(self, module: nn.Module, out: Tensor, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        return (heads_merged(out), None)[: 1 + output_attentions]  # pyright: ignore[reportReturnType]


class OpenFoldAdapter:
    """OpenFold's `Attention`, in transformers `EsmFoldAttention`: gated attention with any number of biases (pair bias, masks) on sequences [*, T, C], of MSA
    rows and columns, of triangles' starting and ending nodes."""

    kinds: tuple[str, ...] = ("Attention", "EsmFoldAttention")
    parts: tuple[str, ...] = ("linear_q", "linear_k", "linear_v", "linear_o", "no_heads", "c_hidden")

    def takes(self, module: nn.Module) -> bool:
        return type(module).__name__ in self.kinds and all(hasattr(module, name) for name in self.parts)

    def call(self, module: Any, q_x: Tensor, kv_x: Tensor, biases: list[Tensor] | None = None, **kwargs: Any) -> AttentionCall:
        query, key, value = (
            heads_apart(project(x.flatten(0, -3) if x.dim() > 2 else x[None]), module.no_heads)
            for project, x in ((module.linear_q, q_x), (module.linear_k, kv_x), (module.linear_v, kv_x))
        )
        mask, wanted = None, (*q_x.shape[:-2], module.no_heads, q_x.shape[-2], kv_x.shape[-2])
        for bias in biases or ():
            mask = bias if mask is None else mask + bias
        if mask is not None:
            mask = mask.expand(wanted).reshape(-1, *wanted[-3:])
        return AttentionCall(query, key, value, mask, 1 / math.sqrt(module.c_hidden))

    def result(self, module: Any, out: Tensor, q_x: Tensor, kv_x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        merged = out.transpose(1, 2)  # [*, T, H, D]
        if module.linear_g is not None:
            gate = module.sigmoid(module.linear_g(q_x)).reshape(merged.shape)
            merged = merged * gate
        return module.linear_o(merged.flatten(-2)).reshape(*q_x.shape[:-1], -1)


class FoldingTrunkAdapter:
    """transformers' EsmFoldSelfAttention: a folding trunk's attention over the sequence, with pair bias [B, Q, T, H] and a gate."""

    def takes(self, module: nn.Module) -> bool:
        return type(module).__name__ == "EsmFoldSelfAttention"

    def call(self, module: Any, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, indices: Any = None) -> AttentionCall:
        query, key, value = heads_apart(module.proj(x), module.num_heads).chunk(3, -1)
        added = None if bias is None else bias.permute(0, 3, 1, 2)
        if mask is not None:
            hidden = ~mask.bool()[:, None, None]
            added = ~hidden if added is None else added.masked_fill(hidden, -torch.inf)
        return AttentionCall(query, key, value, added, module.rescale_factor)

    def result(self, module: Any, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        merged = heads_merged(out)
        if module.gated:
            merged = module.g_proj(x).sigmoid() * merged
        return module.o_proj(merged), None


class SwinAdapter:
    """SwinSelfAttention of transformers before it attended by the interface: windows [B W, T, C] with relative positions, and a mask [W, T, T] where windows
    shift."""

    _projections = ProjectionAdapter("SwinSelfAttention", "query", "key", "value", heads="num_attention_heads")

    def takes(self, module: nn.Module) -> bool:
        return self._projections.takes(module)

    def call(self, module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> AttentionCall:
        length = hidden_states.shape[1]
        table = module.relative_position_bias_table[module.relative_position_index.flatten()]
        bias = table.unflatten(0, (length, length)).permute(2, 0, 1)[None]
        if attention_mask is not None:
            bias = bias + attention_mask.repeat(len(hidden_states) // len(attention_mask), 1, 1)[:, None]
        return self._projections.call(module, hidden_states, bias)

    def result(self, module: Any, out: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return heads_merged(out), None


class SamAdapter:
    """transformers' SamVisionAttention, in windows or whole, on states [B, h, w, C], with relative positions along both axes."""

    def takes(self, module: nn.Module) -> bool:
        return type(module).__name__ in ("SamVisionAttention", "SamVisionSdpaAttention")

    def call(self, module: Any, hidden_states: Tensor, output_attentions: Any = None) -> AttentionCall:
        size, heads = hidden_states.shape[1:3], module.num_attention_heads
        query, key, value = (heads_apart(x, heads) for x in module.qkv(hidden_states.flatten(1, 2)).chunk(3, -1))
        bias = None
        if module.use_rel_pos:
            bias = module.get_decomposed_rel_pos(query.flatten(0, 1), module.rel_pos_h, module.rel_pos_w, size, size)
            bias = bias.reshape(*query.shape[:3], key.shape[2])
        return AttentionCall(query, key, value, bias, module.scale)

    def result(self, module: Any, out: Tensor, hidden_states: Tensor, output_attentions: Any = None) -> tuple[Tensor, None]:
        return module.proj(heads_merged(out).unflatten(1, hidden_states.shape[1:3])), None


class TimmAdapter:
    """timm's `Attention`: one projection for all three, norms of queries and keys."""

    parts: tuple[str, ...] = ("qkv", "q_norm", "k_norm", "proj", "num_heads", "scale")

    def takes(self, module: nn.Module) -> bool:
        return type(module).__module__.startswith("timm.") and type(module).__name__ == "Attention" and all(hasattr(module, n) for n in self.parts)

    def call(self, module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> AttentionCall:
        query, key, value = (heads_apart(part, module.num_heads) for part in module.qkv(x).chunk(3, -1))
        return AttentionCall(module.q_norm(query), module.k_norm(key), value, attn_mask, module.scale)

    def result(self, module: Any, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return module.proj_drop(module.proj(getattr(module, "norm", nn.Identity())(heads_merged(out))))


class TorchAdapter:
    """`torch.nn.MultiheadAttention`, and with it PyTorch's own transformer layers. Weights are not computed: None is returned in their place."""

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and module.bias_k is None and not module.add_zero_attn

    def call(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> AttentionCall:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if module.in_proj_weight is None else module.in_proj_weight.chunk(3)
        shifts = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        states = [heads_apart(linear(self._batch(module, x), w, b), module.num_heads) for x, w, b in zip((query, key, value), weights, shifts, strict=True)]
        mask = None if attn_mask is None else _added(attn_mask, query.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, module.num_heads))
        if key_padding_mask is not None:
            hidden = _added(key_padding_mask.reshape(-1, 1, 1, key_padding_mask.shape[-1]), query.dtype)
            mask = hidden if mask is None else mask + hidden
        return AttentionCall(states[0], states[1], states[2], mask, module.head_dim**-0.5)

    def result(self, module: Any, out: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        projected = module.out_proj(heads_merged(out))
        if query.dim() == 2:
            return projected[0], None
        return projected if module.batch_first else projected.transpose(0, 1), None

    def _batch(self, module: Any, x: Tensor) -> Tensor:
        """[B, T, C]."""
        if x.dim() == 2:
            return x[None]
        return x if module.batch_first else x.transpose(0, 1)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of torch.nn, True where it hides, as what is added to the logits."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


ADAPTERS: tuple[AttentionAdapter, ...] = (
    TimesformerAdapter(), SwinAdapter(), SamAdapter(), TimmAdapter(), OpenFoldAdapter(), FoldingTrunkAdapter(), TorchAdapter(),
)  # fmt: skip
"""Those that every engine has."""
