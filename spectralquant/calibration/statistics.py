"""Streaming moments of keys, queries and values: bounded memory, whatever the amount of text.

Products of one batch are float32, sums over batches float64. Keys and queries are taken before the rotary embedding, so that every frame
of the codec follows from the same sums (`rope.Rotary.average_rotated`).

Queries are weighted by how much an error of the keys they look at is felt. With attention p over tokens t, output o = sum_t p_t v_t, and an
error e_t on key t, the output moves to first order by sum_t p_t (q . e_t) (v_t - o), so for independent errors the expected squared move is

    sum_t p_t^2 |v_t - o|^2  e_t (q^T q) e_t^T

and the metric of the keys is the mean of q^T q with weights sum_t p_t^2 |v_t - o|^2 over the tokens that will be coded. A query that looks at the
attention sink and nothing else, as most do, counts for nothing, however long it is.

The same sum taken over the queries says how much an error of one key is felt. Few tokens are looked at, and their keys are unlike the others', so
the mean and covariance of the keys are weighted by it too, within `KEY_WEIGHT_CAP`: on some tens of thousands of tokens the bare weights
would leave a few hundred that decide everything.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

NEAR = 64
"""Tokens before a query that are in the exact window."""
KEY_WEIGHT_CAP = 5.0
"""Largest weight of a key, as a multiple of the mean weight of its text."""
SINK_NORM = 0.06
"""A value whose |v|^2 is below this share of its text's median marks an attention sink, which stays exact and has no weight."""
_TINY = 1e-30

MAX_NORMS = 65_536
"""Tokens per layer whose value norms are kept, for the median; later ones no longer change it noticeably."""


@dataclass(slots=True)
class Moments:
    """Mass [H], sum [H, D] and second moment [H, D, D] of weighted vectors, in float64 on the CPU."""

    mass: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    total: Tensor | None = None
    square: Tensor | None = None

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """x: [H, n, D]; weight: [H, n], non-negative (None: 1)."""
        x = x.float()
        weighted = x if weight is None else x * weight.float()[..., None]
        mass = torch.full((len(x),), float(x.shape[1])) if weight is None else weight.float().sum(1)
        sums = [t.double().cpu() for t in (mass, weighted.sum(1), weighted.mT @ x)]
        if self.total is not None and self.square is not None:
            sums = [a + b for a, b in zip((self.mass, self.total, self.square), sums, strict=True)]
        self.mass, self.total, self.square = sums

    @property
    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.mass.clamp_min(_TINY)[:, None]

    @property
    def second(self) -> Tensor:
        """E[x^T x], uncentred."""
        assert self.square is not None
        return self.square / self.mass.clamp_min(_TINY)[:, None, None]


@dataclass(frozen=True, slots=True)
class FeltErrors:
    """How much errors of the keys are felt, see above.

    Attributes:
        queries: [H, G, n], weights of the queries.
        keys: [H, T], weights of the keys, mean 1 before the cap over those that will be coded.
    """

    queries: Tensor
    keys: Tensor


def felt_errors(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, metric: Tensor | None, softcap: float | None, skip: int) -> FeltErrors:
    """How much errors of the keys of one text are felt by some of its queries.

    Args:
        queries: [H, G, n, D] float32, scaled, at `positions` [n] of the text.
        keys, values: [H, T, D] float32 of the whole text.
        metric: [H, D, D], the metric of the output, or None for the identity.
        softcap: Of the logits.
        skip: First positions that stay exact. The nearest `NEAR` tokens stay exact too, or a quarter of a short text.
    """
    flat = queries.flatten(1, 2)
    scores = flat @ keys.mT
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    slots = torch.arange(keys.shape[1], device=keys.device)
    hidden = (slots > positions[:, None]).repeat(queries.shape[1], 1)
    weight = scores.masked_fill(hidden, -torch.inf).softmax(-1)  # [H, G * n, T]
    output = weight @ values
    mapped = values if metric is None else values @ metric.to(values)
    mapped_output = output if metric is None else output @ metric.to(values)
    distance = (mapped * values).sum(-1)[:, None] - 2 * output @ mapped.mT + (mapped_output * output).sum(-1, keepdim=True)
    near = min(NEAR, keys.shape[1] // 4)
    coded = (slots >= skip) & (slots < (positions[:, None] - near).repeat(queries.shape[1], 1))
    felt = weight.square() * distance.clamp_min(0) * coded
    by_key = flat.square().sum(-1)[:, None] @ felt  # [H, 1, T]
    return FeltErrors(felt.sum(-1).unflatten(1, queries.shape[1:3]), _key_weights(by_key[:, 0], values, skip))


def _key_weights(felt: Tensor, values: Tensor, skip: int) -> Tensor:
    """Weights [H, T] from what is felt [H, T] of each key: none for sinks, mean 1 for the others, capped. Alike where nothing is felt."""
    norm = values.square().sum(-1)
    coded = norm >= SINK_NORM * norm.median(-1, keepdim=True).values
    coded[:, :skip] = False
    felt = felt * coded
    mean = felt.sum(-1, keepdim=True) / coded.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(mean > _TINY, (felt / mean.clamp_min(_TINY)).clamp_max(KEY_WEIGHT_CAP), 1.0) * coded


@dataclass(slots=True)
class LayerStatistics:
    """What one attention layer showed.

    Attributes:
        keys, values: Moments per KV head, all tokens alike.
        seen_keys: Moments of the keys weighted by `felt_errors`.
        queries: Moments of the queries weighted by `felt_errors`; those of a group are pooled in the KV head they read.
        peak: Largest |k| or |v| seen.
        value_norms: |v|^2, [H, n] per batch, at most MAX_NORMS tokens in all.
    """

    keys: Moments = field(default_factory=Moments)
    seen_keys: Moments = field(default_factory=Moments)
    queries: Moments = field(default_factory=Moments)
    values: Moments = field(default_factory=Moments)
    peak: float = 0.0
    value_norms: list[Tensor] = field(default_factory=list)

    def add(self, keys: Tensor, queries: Tensor, values: Tensor, query_weight: Tensor | None = None, key_weight: Tensor | None = None) -> None:
        """keys, values [H, n, D] with weights [H, n] of the keys, queries [H, m, D] with weights [H, m] (None: all alike)."""
        self.keys.add(keys)
        self.seen_keys.add(keys, key_weight)
        self.queries.add(queries, query_weight)
        self.values.add(values)
        self.peak = max(self.peak, float(keys.abs().max()), float(values.abs().max()))
        if sum(n.shape[1] for n in self.value_norms) < MAX_NORMS:
            self.value_norms.append(values.float().square().sum(-1).cpu())
