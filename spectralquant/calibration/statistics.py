"""Streaming moments of keys, queries and values: bounded memory, whatever the amount of text.

Products of one batch are float32, sums over batches float64. Keys and queries are taken before the rotary embedding, so that every frame
of the codec follows from the same sums (`rope.Rotary.average_rotated`).
"""

from dataclasses import dataclass, field

from torch import Tensor

MAX_NORMS = 65_536
"""Tokens per layer whose value norms are kept, for the median; later ones no longer change it noticeably."""


@dataclass(slots=True)
class Moments:
    """Count, sum [H, D] and second moment [H, D, D] of vectors, in float64 on the CPU."""

    count: int = 0
    total: Tensor | None = None
    square: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x: [H, n, D]."""
        x = x.float()
        total, square = x.sum(1).double().cpu(), (x.mT @ x).double().cpu()
        self.total = total if self.total is None else self.total + total
        self.square = square if self.square is None else self.square + square
        self.count += x.shape[1]

    @property
    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.count

    @property
    def second(self) -> Tensor:
        """E[x^T x], uncentred."""
        assert self.square is not None
        return self.square / self.count


@dataclass(slots=True)
class LayerStatistics:
    """What one attention layer showed.

    Attributes:
        keys, queries, values: Moments per KV head; queries of a group are pooled in the KV head they read.
        peak: Largest |k| or |v| seen.
        value_norms: |v|^2, [H, n] per batch, at most MAX_NORMS tokens in all.
    """

    keys: Moments = field(default_factory=Moments)
    queries: Moments = field(default_factory=Moments)
    values: Moments = field(default_factory=Moments)
    peak: float = 0.0
    value_norms: list[Tensor] = field(default_factory=list)

    def add(self, keys: Tensor, queries: Tensor, values: Tensor) -> None:
        """keys, values [H, n, D], queries [H, G * n, D]."""
        self.keys.add(keys)
        self.queries.add(queries)
        self.values.add(values)
        self.peak = max(self.peak, float(keys.abs().max()), float(values.abs().max()))
        if sum(n.shape[1] for n in self.value_norms) < MAX_NORMS:
            self.value_norms.append(values.float().square().sum(-1).cpu())
