"""Attention by decoded tiles against a float64 oracle and the reference: on the CPU; the flash attention of GPUs with a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import synthetic
import torch
from shared_prefix import with_prefix
from tolerances import ATTENTION, FLASH
from torch import Tensor

import spectralquant.attention.tiles as tiles
from spectralquant.attention.reference import attend
from spectralquant.attention.tiles import attend_tiles
from spectralquant.cache.segment import Segment
from spectralquant.codec.codec import build_codec
from spectralquant.codec.layout import UNIT
from spectralquant.codec.packed import PackedKV
from spectralquant.codec.prefix import Prefix
from spectralquant.codec.units import coded_slots, decode_units
from spectralquant.config import CacheConfig, Dials
from spectralquant.presets import PRESETS
from spectralquant.rope import Rotary

FLASH_OF_GPUS = torch.ops.aten._flash_attention_forward.default

CASES: dict[str, dict[str, Any]] = {
    "a chunk": {},
    "two positions": {"new": 2},
    "more positions than are packed": {"new": 700, "past": 300},
    "nothing packed": {"past": 60, "new": 50, "start": (0, 7)},
    "padding over whole units": {"start": (0, 600)},
    "padding into the window": {"start": (930, 0), "past": 950},
    "padding into the new tokens": {"start": (0, 960), "past": 950},
    "one sequence": {"batch": 1},
    "interleaved": {"rotary": "gptj"},
    "no rotary": {"rotary": None},
    "plain frame": {"run": 0},
    "sinks": {"sinks": True},
    "another scale": {"scale": 0.3},
    "no missing mass": {"mass": False},
    "one query head": {"groups": 1},
    "head size 80": {"dim": 80},
    "head size 128": {"dim": 128},
    "joint values": {"quantizer": "joint"},
    "head size 256": {"dim": 256, "heads": 1},
    "no exact store": {"config": {"sinks": 0, "max_exact_share": 0.0}},
    "many exact tokens": {"config": {"sinks": 64}},
}


class Case:
    """`new` queries a head over packed random keys and values of `past` tokens and their own."""

    def __init__(
        self, dim: int = 64, heads: int = 2, groups: int = 3, batch: int = 2, past: int = 950, new: int = 150, dtype: torch.dtype = torch.float32,
        rotary: str | None = "neox", start: tuple[int, ...] = (0, 5), quantizer: str = "uniform", scale: float | None = None, sinks: bool = False,
        mass: bool = True, device: str = "cpu", config: dict[str, Any] | None = None, **choices: Any,
    ) -> None:  # fmt: skip
        turn = None if rotary is None else Rotary(synthetic.inv_freq(dim // 2), rotary == "gptj")
        profile = synthetic.profile(heads, dim, (0,), rotary=turn, **choices)
        layer = replace(profile.layers[0], missing_mass=torch.randn(heads, groups) if mass else None, value_norm=torch.full((heads,), float(dim)))
        codec = build_codec(replace(profile, layers={0: layer}), PRESETS["high"], Dials(), device, quantizer)[0]
        start = torch.tensor((start * batch)[:batch])
        keys, values = synthetic.samples(layer.key, past + new, batch), synthetic.samples(layer.value, past + new, batch)
        if turn is not None:
            keys = turn.rotate(keys.double(), (torch.arange(past + new)[None] - start[:, None])[:, None])
        values[:, :, 200:204] *= 0.01  # secondary sinks
        keys, values, start = keys.to(device, dtype), values.to(device, dtype), start.to(device)
        segment = Segment(codec, CacheConfig(**{"window": 64, "tile_tokens": 512, **(config or {})}), keys, start)
        segment.update(keys[:, :, :past], values[:, :, :past])
        view = segment.update(keys[:, :, past:], values[:, :, past:])  # what it packs now is beyond `view`
        assert view is not None
        self.kv: PackedKV = view
        self.query = (1.5 * torch.randn(batch, new, heads * groups, dim)).transpose(1, 2).to(device, dtype)
        self.scale, self.sinks = scale, torch.randn(heads * groups).to(device) if sinks else None

    def got(self) -> Tensor:
        return attend_tiles(self.query, self.kv, self.scale, self.sinks)

    def mask(self) -> Tensor:
        slots = torch.arange(self.kv.length, device=self.query.device)
        causal = slots[None] <= slots[-self.query.shape[2] :, None]
        return (causal[None] & (slots >= self.kv.start[:, None])[:, None])[:, None]

    def reference(self) -> Tensor:
        return attend(self.query.float(), self.kv, self.mask(), self.scale, None, self.sinks)

    def oracle(self) -> Tensor:
        """Float64 softmax over keys and values as they decode to in the model's dtype, column by column."""
        kv, groups = self.kv, self.query.shape[1] // self.kv.shape[1]
        keys, values = (kv.dense(which).double().repeat_interleave(groups, 1) for which in ("key", "value"))
        logits = self.query.double() @ keys.mT * (self.scale or keys.shape[-1] ** -0.5)
        if kv.codec.missing_mass is not None:
            logits[..., : kv.packed] += kv.codec.missing_mass.double().view(-1, 1, 1) * coded_slots(kv.codec, kv.units(0, kv.packed // UNIT))[:, None, None]
        logits = logits.masked_fill(~self.mask(), -torch.inf)
        column = torch.full_like(logits[..., :1], -torch.inf) if self.sinks is None else self.sinks.double().view(-1, 1, 1).expand_as(logits[..., :1])
        weights = torch.cat([logits, column], -1).softmax(-1).nan_to_num(0.0)
        return weights[..., :-1] @ values


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("options", [*CASES.values(), {"new": 1}], ids=[*CASES, "one position"])
def test_attend_tiles(options: dict[str, Any], poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, the last one short; rows of tiles beyond the tokens that count are NaN at first."""
    monkeypatch.setattr(tiles, "MIN_TILE", 256)
    case = Case(**options)
    got = case.got()
    assert got.shape == case.query.shape and got.dtype == case.query.dtype
    assert relative_rms(got, case.oracle()) < ATTENTION and relative_rms(got, case.reference()) < ATTENTION
    blind = ~case.mask().any(-1)[:, 0]  # [B, Q]: queries at padding
    assert (got.transpose(1, 2)[blind] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attend_tiles_in_16_bits(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    got = case.got()
    assert got.dtype == dtype and relative_rms(got, case.oracle()) < FLASH[dtype] and relative_rms(got, case.reference()) < FLASH[dtype]


def test_attend_tiles_tile_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(batch=3, start=(0, 5, 300), past=1500)
    want = case.got()
    for tokens in (128, 384, 4096):
        monkeypatch.setattr(tiles, "MIN_TILE", tokens)
        monkeypatch.setattr(tiles, "TILE_TOKENS", 3 * tokens)
        case.kv = replace(case.kv, tile_tokens=tokens)
        assert relative_rms(case.got(), want) < ATTENTION


def test_attend_tiles_lloyd_max() -> None:
    case = Case(quantizer="lloyd-max")
    assert relative_rms(case.got(), case.oracle()) < ATTENTION


def test_attend_tiles_of_logits_beyond_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of thousands: parts are merged by their log-sum-exps, never by masses."""
    monkeypatch.setattr(tiles, "MIN_TILE", 256)
    case = Case(scale=40.0)
    assert relative_rms(case.got(), case.oracle()) < 100 * ATTENTION  # logits have float32's relative error


def test_attend_tiles_takes_any_strides_of_queries() -> None:
    case = Case()
    want = case.got()
    case.query = case.query.contiguous().repeat(1, 1, 1, 2)[..., : case.query.shape[-1]]
    assert torch.equal(case.got(), want)


def test_attend_tiles_gives_no_gradients() -> None:
    case = Case()
    case.query.requires_grad_(True)
    assert not case.got().requires_grad


@pytest.mark.parametrize("options", [{}, {"batch": 3, "start": (0, 5, 300)}, {"batch": 1}], ids=["two", "padding", "one sequence"])
@pytest.mark.parametrize("units", [1, 3])
def test_attend_tiles_over_a_prefix(options: dict[str, Any], units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MIN_TILE", 256)
    case = Case(**options)
    want = case.got()
    case.kv = with_prefix(case.kv, units)
    assert relative_rms(case.got(), want) < ATTENTION and relative_rms(case.reference(), want) < ATTENTION


def test_attend_tiles_decodes_once_what_all_sequences_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prefix for three sequences of different windows: decoded as one sequence, and the result is that of three copies."""
    monkeypatch.setattr(tiles, "MIN_TILE", 256)
    decoded = []
    monkeypatch.setattr(tiles, "decode_units", lambda codec, records, *rest: (decoded.append(records.shape[0]), decode_units(codec, records, *rest)))
    case = Case(batch=3, start=(0,))
    prefix = Prefix(case.kv.records[:1], torch.zeros(3, dtype=torch.int32), 3)
    behind, front = case.kv.records[:, :, 3:].contiguous(), case.kv.records[:1, :, :3].expand(3, -1, -1, -1)
    exact = case.kv.exact_slots[:1].expand(3, -1).contiguous()  # gains say which are exact: those of the first sequence
    case.kv = replace(case.kv, records=torch.cat([front, behind], 2), exact_slots=exact, packed=3 * UNIT)
    want = case.got()
    decoded.clear()
    case.kv = replace(case.kv, records=behind, prefix=prefix)
    assert relative_rms(case.got(), want) < ATTENTION and set(decoded) == {1}


def flash_by_hand(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, bounds: Tensor, longest: int, most: int, *rest: Any, scale: float, seqused_k: Tensor
) -> tuple[Tensor, ...]:
    """What `_flash_attention_forward` computes, written from its description; the real one, asked for shapes alone, takes the same arguments."""
    meta = [x.to("meta") for x in (query, keys, values, starts, bounds)]
    shapes = FLASH_OF_GPUS(*meta, longest, most, *rest, scale=scale, seqused_k=seqused_k.to("meta"))
    out, lse = torch.zeros_like(query), torch.full((query.shape[1], len(query)), torch.inf)
    for i, count in enumerate(seqused_k.tolist()):
        assert starts.dtype == bounds.dtype == seqused_k.dtype == torch.int32 and count <= most and starts[i + 1] - starts[i] <= longest
        shown = slice(int(bounds[i]), int(bounds[i]) + count)
        k, v = (x[shown].repeat_interleave(query.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (keys, values))
        scores = query[starts[i] : starts[i + 1]].transpose(0, 1) @ k.mT * scale
        if rest[1]:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).tril(count - scores.shape[1]) == 0, -torch.inf)
        found = scores.logsumexp(-1)
        lse[:, starts[i] : starts[i + 1]] = found.masked_fill(found.isneginf(), torch.inf)
        out[starts[i] : starts[i + 1]] = (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(0, 1)
    assert out.shape == shapes[0].shape and lse.shape == shapes[1].shape and lse.dtype == shapes[1].dtype
    return out, lse, *shapes[2:]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_attend_tiles_asks_flash_attention_of_gpus_for_the_same(options: dict[str, Any], poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of GPUs on the CPU, with a double for the one operation that CPUs lack."""
    monkeypatch.setattr(tiles, "MIN_TILE", 256)
    monkeypatch.setattr(tiles, "_flash_on_cpu", tiles._flash_on_gpu)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_by_hand)
    case = Case(**options)
    assert relative_rms(case.got(), case.oracle()) < ATTENTION


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_attend_tiles_on_the_device(options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MIN_TILE", 256)
    case = Case(**options, dtype=dtype, device="cuda")
    got = case.got()
    assert relative_rms(got, case.oracle()) < FLASH[dtype] and relative_rms(got, case.reference()) < FLASH[dtype]
    assert (got.transpose(1, 2)[~case.mask().any(-1)[:, 0]] == 0).all()
    assert torch.equal(got, case.got())


@pytest.mark.gpu
def test_attend_tiles_never_waits_for_the_device() -> None:
    case = Case(dtype=torch.bfloat16, device="cuda")
    case.got()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.got()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_attend_tiles_holds_one_tile() -> None:
    """Peak memory does not grow with the past."""
    peaks = []
    for past in (40_000, 80_000):
        case = Case(dtype=torch.bfloat16, device="cuda", batch=1, past=past, new=300, config={"tile_tokens": 32_768, "max_exact_share": 0.0})
        case.got()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.got()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 1.2 * peaks[0]
