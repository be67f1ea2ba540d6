"""The mass that coded tokens lack in the softmax, measured per query head.

A quantized key is close to the mean of the keys that share its code, k = k^ + e with E[e | k^] = 0, so by Jensen's inequality

    E[exp(q . k) | k^] >= exp(q . k^),    for Gaussian e: E[exp(q . k) | k^] = exp(q . k^ + q E q / 2),  E = E[e^T e]

and coded tokens together get too little of the softmax beside those that stayed exact: 5 to 10 % at 2.4 bits. The share is much the same for all
queries of a head, so a constant per query head, added to the logits of coded tokens, puts it back. It is measured and not taken from the formula, whose
Gaussian e is only nearly true: the mean over queries of log sum exp(q . k) - log sum exp(q . k^), weighted by p (1 - p), p the share of the coded
tokens, because that is how much a change of the share moves the output. It grows with E, so it is kept per unit of the expected error and serves
every preset.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectralquant.calibration.products import layer_index

QUERIES = 32
"""Queries of each window that are looked at."""
_TINY = 1e-6


@dataclass(frozen=True, slots=True)
class Asked:
    """Queries of one layer and what they see.

    Attributes:
        queries: [W, H, G * n, D] float32, scaled.
        seen: [W, H, G * n], log of the sum of exp over all keys that each query sees.
        groups: G.
        softcap: Of the logits.
    """

    queries: Tensor
    seen: Tensor
    groups: int
    softcap: float | None


def _log_mass(queries: Tensor, keys: Tensor, softcap: float | None, hidden: Tensor) -> Tensor:
    """log of the sum of exp over keys [W, H, T, D] that are not `hidden` (bool, broadcast against [W, H, G * n, T]), [W, H, G * n]."""
    logits = queries @ keys.float().mT
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.masked_fill(hidden, -torch.inf).logsumexp(-1)


@dataclass(frozen=True, slots=True)
class QueryRecorder:
    """Keeps some queries of the layers `coded`; `attention` goes to `recording`.

    Attributes:
        asked: Layer index -> queries of its last call.
    """

    coded: frozenset[int]
    asked: dict[int, Asked] = field(default_factory=dict)

    def attention(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> None:
        index = layer_index(module)
        if index not in self.coded:
            return
        heads, new, total = key.shape[1], query.shape[2], key.shape[2]
        places = torch.linspace(0, new - 1, min(QUERIES, new), device=key.device).long()
        states = (query[:, :, places].float() * scale).unflatten(1, (heads, -1))  # [W, H, G, n, D]
        hidden = torch.arange(total, device=key.device) > (total - new + places)[:, None]
        groups, queries = states.shape[2], states.flatten(2, 3)
        self.asked[index] = Asked(queries, _log_mass(queries, key, softcap, hidden.repeat(groups, 1)), groups, softcap)


def missing_mass(asked: Asked, keys: Tensor, decoded: Tensor, coded: Tensor) -> Tensor:
    """log of what the mass of coded tokens has to be multiplied with, [H, G] float32; 0 where no query looks at any.

    Args:
        asked: Queries over these keys.
        keys, decoded: [W, H, T, D], the keys and what their codes decode to.
        coded: [W, T] bool, which tokens are read as codes.
    """
    if not coded.any():
        return torch.zeros(keys.shape[1], asked.groups)
    hidden = ~coded[:, None, None]
    true, got = (_log_mass(asked.queries, x, asked.softcap, hidden) for x in (keys, decoded))
    share = (true - asked.seen).exp().clamp_max(1.0)  # 0 in windows without coded tokens
    weight = share * (1 - share)
    lack = torch.where(weight > 0, true - got, 0.0) * weight
    sums = [x.unflatten(2, (asked.groups, -1)).sum((0, 3)) for x in (lack, weight)]
    return (sums[0] / sums[1].clamp_min(_TINY)).cpu()
