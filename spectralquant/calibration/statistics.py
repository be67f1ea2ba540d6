"""Streaming moments of keys, queries and values: bounded memory, whatever the amount of text.

Products of one batch are float32, sums over batches float64. Keys and queries are taken before the rotary embedding, so that every frame
of the codec follows from the same sums (`rope.Rotary.average_rotated`).

Queries are weighted by how much an error of the keys they look at is felt. With attention p over tokens t, output o = sum_t p_t v_t, and an
error e_t on key t, the output moves to first order by sum_t p_t (q . e_t) (v_t - o), so for independent errors the expected squared move is

    sum_t p_t^2 |v_t - o|^2  e_t (q^T q) e_t^T

and the metric of the keys is the mean of q^T q with weights sum_t p_t^2 |v_t - o|^2 over the tokens that will be coded. A query that looks at the
attention sink and nothing else, as most do, counts for nothing, however long it is.

The same sum taken over the queries says how much an error of one key is felt, and an error e_t on value t moves the outputs by sum over
queries of p_t^2 |e_t|^2. Few tokens are looked at, and their keys are unlike the others', so the mean and covariance of keys and values are
weighted by these sums too, within `WEIGHT_CAP`: on some tens of thousands of tokens the bare weights would leave a few hundred that
decide everything.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

NEAR = 64
"""Tokens before a query that are in the exact window."""
WEIGHT_CAP = 5.0
"""Largest weight of a token, as a multiple of the mean weight of its text."""
SINK_NORM = 0.06
"""A value whose |v|^2 is below this share of its text's median marks an attention sink, which stays exact and has no weight."""
_TINY = 1e-30

MAX_NORMS = 65_536
"""Tokens per layer whose value norms are kept, for the median; later ones no longer change it noticeably."""


@dataclass(slots=True)
class Moments:
    """Weighted mean and second moment of vectors, summed in float64 on the CPU.

    Vectors are taken relative to `origin` [H, D], the mean of the first batch, before they are multiplied: key biases reach hundreds of
    standard deviations (Qwen2.5), and products that round their factors would leave nothing of the variance beside such a mean.

    Attributes:
        mass: [H], sum of the weights.
        total, square: [H, D] and [H, D, D], weighted sums of x - origin and of its outer product.
    """

    mass: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    origin: Tensor | None = None
    total: Tensor | None = None
    square: Tensor | None = None

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """x: [H, n, D]; weight: [H, n], non-negative (None: 1)."""
        x = x.float()
        if self.origin is None:
            self.origin = x.mean(1)
        x = x - self.origin[:, None]
        weighted = x if weight is None else x * weight.float()[..., None]
        mass = torch.full((len(x),), float(x.shape[1])) if weight is None else weight.float().sum(1)
        sums = [t.double().cpu() for t in (mass, weighted.sum(1), weighted.mT @ x)]
        if self.total is not None and self.square is not None:
            sums = [a + b for a, b in zip((self.mass, self.total, self.square), sums, strict=True)]
        self.mass, self.total, self.square = sums

    @property
    def mean(self) -> Tensor:
        assert self.origin is not None
        return self._start() + self._offset()

    @property
    def covariance(self) -> Tensor:
        assert self.square is not None
        offset = self._offset()
        return self.square / self.mass.clamp_min(_TINY)[:, None, None] - offset[..., :, None] * offset[..., None, :]

    @property
    def second(self) -> Tensor:
        """E[x^T x], uncentred."""
        mean = self.mean
        return self.covariance + mean[..., :, None] * mean[..., None, :]

    def _offset(self) -> Tensor:
        assert self.total is not None
        return self.total / self.mass.clamp_min(_TINY)[:, None]

    def _start(self) -> Tensor:
        """The origin, or 0 where nothing has any weight."""
        assert self.origin is not None
        return self.origin.double().cpu() * (self.mass > 0)[:, None]


@dataclass(frozen=True, slots=True)
class FeltErrors:
    """How much errors are felt, see above.

    Attributes:
        queries: [H, G, n], weights of the queries.
        keys, values: [H, T], weights of the tokens, mean 1 before the cap over those that will be coded.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor

    def after(self, skip: int) -> "FeltErrors":
        """Without the first `skip` tokens."""
        return FeltErrors(self.queries, self.keys[:, skip:], self.values[:, skip:])


def felt_errors(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, metric: Tensor | None, softcap: float | None, skip: int) -> FeltErrors:
    """How much errors of the keys and values of one text are felt by some of its queries.

    Args:
        queries: [H, G, n, D] float32, scaled, at `positions` [n] of the text.
        keys, values: [H, T, D] float32 of the whole text.
        metric: [H, D, D], the metric of the output, or None for the identity.
        softcap: Of the logits.
        skip: First positions that stay exact. The nearest `NEAR` tokens stay exact too, or a quarter of a short text.
    """
    flat = queries.flatten(1, 2)
    with matmul_precision("highest"):  # logits reach thousands where keys have large biases, and their differences matter
        scores = flat @ keys.mT
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    slots, seen_from = torch.arange(keys.shape[1], device=keys.device), positions.repeat(queries.shape[1])[:, None]
    weight = scores.masked_fill_(slots > seen_from, -torch.inf).softmax(-1)  # [H, G * n, T]
    output = weight @ values
    mapped = values if metric is None else values @ metric.to(values)
    mapped_output = output if metric is None else output @ metric.to(values)
    near = min(NEAR, keys.shape[1] // 4)
    by_value = weight.square_().masked_fill_((slots < skip) | (slots >= seen_from - near), 0)
    distance = torch.baddbmm((mapped * values).sum(-1)[:, None], output, mapped.mT, alpha=-2)
    distance += (mapped_output * output).sum(-1, keepdim=True)
    felt = distance.clamp_min_(0).mul_(by_value)
    by_key = flat.square().sum(-1)[:, None] @ felt  # [H, 1, T]
    return FeltErrors(
        felt.sum(-1).unflatten(1, queries.shape[1:3]),
        _token_weights(by_key[:, 0], values, skip),
        _token_weights(by_value.sum(1), values, skip),
    )


@contextmanager
def matmul_precision(setting: str) -> Generator[None]:
    """torch's float32 matmul precision for the length of a with block: "highest" or "medium"."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _token_weights(felt: Tensor, values: Tensor, skip: int) -> Tensor:
    """Weights [H, T] from what is felt [H, T] of each token: none for sinks, mean 1 for the others, capped. Alike where nothing is felt."""
    norm = values.square().sum(-1)
    coded = norm >= SINK_NORM * norm.median(-1, keepdim=True).values
    coded[:, :skip] = False
    felt = felt * coded
    mean = felt.sum(-1, keepdim=True) / coded.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(mean > _TINY, (felt / mean.clamp_min(_TINY)).clamp_max(WEIGHT_CAP), 1.0) * coded


@dataclass(slots=True)
class LayerStatistics:
    """What one attention layer showed.

    Attributes:
        keys, values: Moments per KV head, all tokens alike.
        seen_keys, seen_values: The same weighted by `felt_errors`.
        queries: Moments of the queries weighted by `felt_errors`; those of a group are pooled in the KV head they read.
        peak: Largest |k| or |v| seen.
        value_norms: |v|^2, [H, n] per batch, at most MAX_NORMS tokens in all.
    """

    keys: Moments = field(default_factory=Moments)
    seen_keys: Moments = field(default_factory=Moments)
    queries: Moments = field(default_factory=Moments)
    values: Moments = field(default_factory=Moments)
    seen_values: Moments = field(default_factory=Moments)
    peak: float = 0.0
    value_norms: list[Tensor] = field(default_factory=list)

    def add(self, keys: Tensor, queries: Tensor, values: Tensor, felt: FeltErrors | None = None) -> None:
        """keys, values [H, n, D], queries [H, m, D], and their weights for these very tokens (None: all alike)."""
        self.keys.add(keys)
        self.values.add(values)
        self.seen_keys.add(keys, None if felt is None else felt.keys)
        self.seen_values.add(values, None if felt is None else felt.values)
        self.queries.add(queries, None if felt is None else felt.queries.flatten(1))
        self.peak = max(self.peak, float(keys.abs().max()), float(values.abs().max()))
        if sum(n.shape[1] for n in self.value_norms) < MAX_NORMS:
            self.value_norms.append(values.float().square().sum(-1).cpu())
