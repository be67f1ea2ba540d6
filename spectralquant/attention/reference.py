"""Attention over a PackedKV in plain PyTorch: the specification of the fused kernel, and the backend of every non-CUDA device.

    k = R(t0)^-1-frame code:  q.k = (q R(-t0)) . x^,  x^ = mean + g (s - o) W   =>   q.k = q'.mean + g ((s - o) . (q' W^T))
    out = (sum_t p_t g_t (s_t - o)) W + mean sum_t p_t,      p_t = exp(q.k + c),   c: what the mass of coded tokens lacks (`calibration.mass`)

(s: symbols, o: their offset, see `codec.quantizer`) so keys and values are never decoded: the query goes into symbol space once
per run, the weighted sum comes back once. Packed tokens are read in tiles of `tile_tokens`; softmax is carried across tiles, with the exact
tokens and the raw window as two more tiles. Scores and sums are float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectralquant.attention.softmax import RunningSoftmax
from spectralquant.codec.layout import MASKED_GAIN, PAIRS, UNIT, gain_values, unpack_gains, unpack_pairs
from spectralquant.codec.packed import PackedKV


@dataclass(frozen=True, slots=True)
class _Query:
    """Scaled float32 queries [B, H, N, D], N = G * Q, and what turns raw scores into final ones."""

    states: Tensor
    length: int  # Q
    mask: Tensor | None  # [B, 1, Q, T] bool
    softcap: float | None

    def finish(self, scores: Tensor, visible: Tensor | None, columns: "slice | Tensor") -> Tensor:
        """Soft-cap, then hide. scores [B, H, N, C] for slots `columns` (a slice, or [B, C] indices); visible [B, H or 1, 1, C]."""
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        if self.mask is None:
            return scores
        mask = self.mask[..., columns] if isinstance(columns, slice) else self.mask.gather(-1, columns[:, None, None].expand(-1, 1, self.length, -1))
        by_group = scores.unflatten(2, (-1, self.length))
        return by_group.masked_fill(~mask[:, :, None], -torch.inf).flatten(2, 3)


def attend(
    query: Tensor,
    kv: PackedKV,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of `query` over `kv`.

    Args:
        query: [B, H * G, Q, D]; its Q positions are the last Q slots of `kv`.
        kv: Keys and values, B sequences, H heads.
        mask: [B, 1, Q, T] bool, True where a query sees a slot; None: every slot up to its own.
        scale: Factor of the logits; default D^-1/2.
        softcap: Logits become `softcap * tanh(logits / softcap)`.
        sinks: [H * G] logits of an extra softmax column without a value.

    Returns:
        [B, H * G, Q, D] in the dtype of `query`. A row that sees nothing is zero.
    """
    batch, query_heads, length, dim = query.shape
    heads = kv.raw_keys.shape[1]
    if mask is None and length > 1:
        slots = torch.arange(kv.length, device=query.device)
        mask = (slots[None] <= slots[-length:, None])[None, None].expand(batch, 1, -1, -1)
    states = (query.float() * (dim**-0.5 if scale is None else scale)).reshape(batch, heads, -1, dim)
    q = _Query(states, length, mask, softcap)
    state = _packed_part(q, kv)
    _dense_part(q, state, kv.exact_keys, kv.exact_values, kv.exact_slots.clamp_min(0).long(), kv.exact_valid()[:, None, None])
    _dense_part(q, state, kv.raw_keys, kv.raw_values, slice(kv.packed, kv.length), None)
    if sinks is not None:
        column = sinks.float().view(1, heads, -1, 1).expand(batch, -1, -1, length).reshape(batch, heads, -1, 1)
        state.add(column)
    return state.result().view(batch, query_heads, length, dim).to(query.dtype)


def _dense_part(q: _Query, state: RunningSoftmax, keys: Tensor, values: Tensor, columns: "slice | Tensor", visible: Tensor | None) -> None:
    if keys.shape[-2]:
        scores = q.states @ keys.float().mT
        state.total += state.add(q.finish(scores, visible, columns)) @ values.float()


def _packed_part(q: _Query, kv: PackedKV) -> RunningSoftmax:
    """Softmax state over the packed slots, its sum already back in the space of the values."""
    codec = kv.codec
    symbols = codec.value.decode_matrix.shape[1]
    state = RunningSoftmax.empty(q.states.shape[:-1], symbols + 1, q.states.device)
    for first in range(0, kv.packed, kv.tile_tokens):
        _packed_tile(q, kv, state, first, min(first + kv.tile_tokens, kv.packed))
    # The last column is sum p g: the offset of all symbols at once.
    coded, gained = state.total[..., :symbols], state.total[..., symbols:]
    state.total = (coded - codec.value.quantizer.offset * gained) @ codec.value.decode_matrix + codec.value.mean[:, None] * state.mass[..., None]
    return state


def _packed_tile(q: _Query, kv: PackedKV, state: RunningSoftmax, first: int, last: int) -> None:
    """Take in slots first .. last - 1, a whole number of units that starts at a run."""
    key, key_gain, value, value_gain = kv.codec.layout.split(kv.units(first // UNIT, last // UNIT))
    gain_code = unpack_gains(key_gain).flatten(2)
    if kv.codec.frame is not None:
        scores, bias = _anchored_scores(q.states, kv, key, first, last)
    else:
        scores, bias = _plain_scores(q.states, kv, key)
    scores = torch.addcmul(bias, scores, gain_values(gain_code)[:, :, None])
    scores = q.finish(scores, (gain_code != MASKED_GAIN)[:, :, None], slice(first, last))
    if kv.codec.missing_mass is not None:
        scores = scores.unflatten(2, (-1, q.length)).add_(kv.codec.missing_mass[..., None, None]).flatten(2, 3)
    weights = state.add(scores)
    weights *= gain_values(unpack_gains(value_gain).flatten(2))[:, :, None]
    state.total[..., -1] += weights.sum(-1)
    codes = kv.codec.value.quantizer.symbols(unpack_pairs(value, "value"), head_axis=2).flatten(3, 4)  # [4, B, H, U * 32, S]
    by_pair = weights.unflatten(-1, (-1, 2, PAIRS, 16)).movedim(-2, 0).flatten(4)  # [4, B, H, N, U * 32]
    state.total[..., :-1] += (by_pair @ codes).sum(0)


def _plain_scores(states: Tensor, kv: PackedKV, packed: Tensor) -> tuple[Tensor, Tensor]:
    """(s - o) . (q W^T) of packed keys [B, H, U, bytes] in token order, [B, H, N, T], and q . mean, [B, H, N, 1]."""
    side = kv.codec.key
    coded = states @ side.decode_matrix.mT
    scores = coded @ side.quantizer.symbols(unpack_pairs(packed, "key"), head_axis=2).flatten(3, 4).mT  # [4, B, H, N, U * 32]
    scores = scores.unflatten(-1, (-1, 2, 16)).movedim(0, -2).flatten(3)
    return scores - side.quantizer.offset * coded.sum(-1, keepdim=True), states @ side.mean[:, :, None]


def _anchored_scores(states: Tensor, kv: PackedKV, packed: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """The same with the query turned into the frame of each anchored run; both [B, H, N, T]."""
    codec, frame = kv.codec, kv.codec.frame
    assert frame is not None
    units = frame.run // UNIT
    anchors = frame.anchors(torch.arange(first, last, frame.run, device=states.device), kv.start)  # [B, R]
    turned = frame.rotary.rotate(states[:, :, None], -anchors[:, None, :, None])  # [B, H, R, N, D]
    coded = turned @ codec.key.decode_matrix.mT[:, None]
    missing = -packed.shape[2] % units  # the last run may be half full
    packed = torch.nn.functional.pad(packed, (0, 0, 0, missing)) if missing else packed
    quantizer = codec.key.quantizer
    codes = quantizer.symbols(unpack_pairs(packed.unflatten(2, (-1, units)), "key"), head_axis=2).flatten(4, 5)  # [4, B, H, R, units * 32, S]
    scores = coded @ codes.mT
    scores = scores.unflatten(-1, (units, 2, 16)).movedim(0, -2).flatten(4)  # [B, H, R, N, run]
    scores = scores - quantizer.offset * coded.sum(-1, keepdim=True)
    bias = frame.mean_scores(turned, codec.key.mean)
    return _join_runs(scores)[..., : last - first], _join_runs(bias)[..., : last - first]


def _join_runs(x: Tensor) -> Tensor:
    return x.transpose(2, 3).flatten(3)
