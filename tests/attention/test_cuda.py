"""The fused kernel against the reference: on the host, where every thread is a fiber, and with a GPU on the device."""

import random
import shutil
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import synthetic
import torch
from host_attention import run_on_host
from shared_prefix import with_prefix
from tolerances import FLOAT32
from torch import Tensor

from spectralquant.attention.cuda import FusedAttention, Launch, Workspace, anchor_table, plan_launch, rows_of, runs_of
from spectralquant.attention.kernel_constants import build_constants
from spectralquant.attention.reference import attend
from spectralquant.cache.segment import Segment
from spectralquant.codec.codec import build_codec
from spectralquant.codec.packed import PackedKV
from spectralquant.config import CacheConfig, Dials
from spectralquant.errors import BackendError
from spectralquant.presets import PRESETS
from spectralquant.rope import Rotary

HOST = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
ERROR = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative RMS of the output: queries are coded in float16; 16-bit outputs are rounded once more."""


class Case:
    """Packed random keys and values of one layer, queries, and what the reference makes of them. Options beyond the sizes are the tests'."""

    def __init__(
        self, dim: int = 64, heads: int = 2, groups: int = 3, batch: int = 2, tokens: int = 700, new: int = 1, dtype: torch.dtype = torch.float32,
        rotary: str | None = "neox", start: tuple[int, ...] = (0, 5), preset: str = "high", quantizer: str = "uniform", softcap: float | None = None,
        sinks: bool = False, amplitude: float = 1.0, device: str = "cpu", mass: bool = True, **choices: Any,
    ) -> None:  # fmt: skip
        turn = None if rotary is None else Rotary(synthetic.inv_freq(dim // 4 if rotary == "partial" else dim // 2), rotary == "gptj")
        profile = synthetic.profile(heads, dim, (0,), rotary=turn, **choices)
        layer = profile.layers[0]
        layer = replace(layer, key=replace(layer.key, mean=amplitude * layer.key.mean), value_norm=torch.full((heads,), float(dim)))
        layer = replace(layer, missing_mass=0.1 * torch.randn(heads, groups) if mass else None)
        codec = build_codec(replace(profile, layers={0: layer}), PRESETS[preset], Dials(), device, quantizer)[0]
        self.start = torch.tensor((start * batch)[:batch])
        keys, values = synthetic.samples(layer.key, tokens, batch), synthetic.samples(layer.value, tokens, batch)
        if turn is not None:
            keys = turn.rotate(keys.double(), (torch.arange(tokens)[None] - self.start[:, None])[:, None])
        keys, values, self.start = keys.to(device, dtype), values.to(device, dtype), self.start.to(device)
        values[:, :, 200:204] *= 0.01  # secondary sinks
        segment = Segment(codec, CacheConfig(window=64), keys, self.start)
        segment.update(keys[:, :, : tokens - new], values[:, :, : tokens - new])
        view = segment.update(keys[:, :, tokens - new :], values[:, :, tokens - new :])
        assert view is not None
        self.kv: PackedKV = view
        self.query = (1.5 * torch.randn(batch, new, heads * groups, dim)).transpose(1, 2).to(device, dtype)
        self.softcap, self.sinks = softcap, torch.randn(heads * groups).to(device) if sinks else None

    def want(self) -> Tensor:
        slots, new = torch.arange(self.kv.length, device=self.start.device), self.query.shape[2]
        mask = (slots[None] <= slots[-new:, None])[None] & (slots >= self.start[:, None])[:, None]
        return attend(self.query.float(), self.kv, mask[:, None], None, self.softcap, self.sinks)

    def launch(self, blocks: int = 5) -> Launch:
        constants = build_constants(self.kv.codec)
        anchors = anchor_table(constants, runs_of(self.kv.room, constants.definitions["RUN"]), self.start.device)
        workspace = Workspace.make(*Workspace.sizes(self.query, len(self.query), self.kv.shape[1], blocks), blocks, self.start.device)
        return plan_launch(self.query, self.kv, constants, anchors, workspace, None, self.softcap, self.sinks)


CASES = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "interleaved": {"rotary": "gptj"},
    "no missing mass": {"mass": False},
    "partial rotary": {"rotary": "partial"},
    "no rotary": {"rotary": None},
    "plain frame": {"run": 0},
    "constant mean": {"trajectory": False},
    "head size 80": {"dim": 80, "heads": 1},
    "head size 96, standard": {"dim": 96, "heads": 1, "preset": "standard"},
    "head size 128": {"dim": 128, "tokens": 1100},
    "head size 256": {"dim": 256, "heads": 1, "groups": 2, "tokens": 500},
    "joint values, ultra": {"quantizer": "joint", "preset": "ultra"},
    "4 queries of 7 heads": {"groups": 7, "new": 4},
    "16 queries": {"groups": 1, "new": 16, "dtype": torch.bfloat16},
    "a chunk of 150 queries": {"groups": 2, "new": 150, "batch": 1, "heads": 1, "tokens": 900},
    "71 heads": {"groups": 71, "heads": 1, "batch": 1, "tokens": 400},
    "soft-cap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "soft-cap and sinks, bfloat16": {"softcap": 20.0, "sinks": True, "dtype": torch.bfloat16},
    "padding over packed units": {"start": (0, 300), "tokens": 650},
    "padding into the window": {"start": (0, 640), "tokens": 650},
    "nothing packed": {"tokens": 70, "start": (0, 3)},
    "large key bias": {"amplitude": 100.0, "dim": 128, "heads": 1},
}


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@HOST
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_kernel_on_the_host(options: dict[str, Any]) -> None:
    case = Case(**options)
    got = run_on_host(case.launch())
    assert got.dtype == case.query.dtype and relative_rms(got, case.want()) < ERROR[got.dtype]


@HOST
@pytest.mark.parametrize("options", [{}, {"new": 4, "batch": 3, "start": (0, 5, 300)}, {"rotary": None}], ids=["one query", "padding", "plain frame"])
@pytest.mark.parametrize("units", [1, 2, 3])
def test_kernel_reads_a_prefix(options: dict[str, Any], units: int) -> None:
    """The same bits, whether the first units stand in the sequences' own store or in one that they share."""
    case = Case(**options)
    want = run_on_host(case.launch())
    case.kv = with_prefix(case.kv, units)
    assert torch.equal(run_on_host(case.launch()), want)


def random_options(seed: int) -> dict[str, Any]:
    """Sizes, lengths and padding of any kind; few compile-time variants."""
    draw = random.Random(seed)
    batch, tokens, new = draw.randint(1, 4), draw.choice([draw.randint(2, 300), draw.randint(300, 1500)]), draw.choice([1, 1, draw.randint(2, 16)])
    return {
        "batch": batch, "tokens": max(tokens, new + 1), "new": new, "heads": draw.randint(1, 4), "groups": draw.choice([1, 2, 4, 7, draw.randint(1, 16)]),
        "start": tuple(draw.choice([0, draw.randint(0, tokens - 1)]) for _ in range(batch)), "dim": draw.choice([64, 64, 128]),
        "dtype": draw.choice([torch.float16, torch.bfloat16]), "rotary": draw.choice(["neox", "neox", None]), "amplitude": draw.choice([1.0, 10.0]),
    }  # fmt: skip


@HOST
@pytest.mark.parametrize("seed", range(6))
def test_kernel_on_random_shapes_on_the_host(seed: int) -> None:
    case = Case(**random_options(seed))
    assert relative_rms(run_on_host(case.launch(random.Random(seed).choice([1, 5, 40, 132]))), case.want()) < ERROR[case.query.dtype]


@HOST
def test_kernel_does_not_depend_on_the_split() -> None:
    """Any number of blocks, more than there are steps included: the same up to the order of sums, and the same bits every time."""
    case = Case(batch=3, start=(0, 5, 130))
    first, *others = (run_on_host(case.launch(blocks)) for blocks in (1, 2, 3, 7, 16, 64, 400, 400))
    for other in others:
        assert relative_rms(other, first) < 10 * FLOAT32
    assert torch.equal(others[-1], others[-2])


@HOST
@pytest.mark.parametrize("blocks", [1, 4, 9])
def test_kernel_reads_lengths_from_memory(blocks: int) -> None:
    """Shorter sequences than the store holds, among them one of no tokens, whose output is zero; tickets are zero afterwards."""
    case = Case(batch=3, rotary=None, start=(0,), tokens=900)
    launch = case.launch(blocks)
    lengths, tickets = launch.arguments[10], launch.arguments[22]
    lengths[1], lengths[2] = torch.tensor([2, 1]), torch.tensor([0, 0])
    got = run_on_host(launch)
    short = replace(case.kv, packed=256, raw_keys=case.kv.raw_keys[:, :, :1], raw_values=case.kv.raw_values[:, :, :1])
    short = replace(short, exact_slots=case.kv.exact_slots.masked_fill(case.kv.exact_slots > 256, -1))  # the query stands in slot 256
    assert relative_rms(got[:1], case.want()[:1]) < ERROR[torch.float32]
    assert relative_rms(got[1:2], attend(case.query, short)[1:2]) < ERROR[torch.float32]
    assert (got[2] == 0).all() and (tickets == 0).all()


@HOST
def test_kernel_takes_any_strides_of_queries() -> None:
    case = Case()
    want = run_on_host(case.launch())
    case.query = case.query.repeat(1, 1, 1, 2)[..., : case.query.shape[-1]]
    assert torch.equal(run_on_host(case.launch()), want)


def test_build_constants_rejects_levels_from_tables() -> None:
    codec = build_codec(synthetic.profile(), PRESETS["high"], Dials(), quantizer="lloyd-max")[0]
    with pytest.raises(BackendError, match="lloyd-max"):
        build_constants(codec)


def test_plan_refuses_more_steps_than_the_kernel_counts() -> None:
    case = Case(batch=1)
    constants, kv = build_constants(case.kv.codec), replace(case.kv, records=case.kv.records[:, :, :1].expand(-1, -1, 1 << 30, -1))
    with pytest.raises(BackendError, match="2\\^31"):
        plan_launch(case.query, kv, constants, constants.turns, Workspace.make(1, 1, 1, case.start.device), None, None, None)


def test_row_groups_cover_all_queries() -> None:
    case = Case(groups=3, new=7, batch=1)
    launch = case.launch()
    assert launch.arguments[22].numel() == 2 * -(-3 * 7 // 8) and launch.out.shape == (1, 7, 6, 64)
    assert [rows_of(n) for n in (1, 4, 5, 8, 9)] == [(4, 1), (4, 1), (8, 1), (8, 1), (8, 2)]


def test_tables_that_graphs_may_read_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer cache got a longer table of anchors, and the shorter one was freed while the CUDA graph of another cache read it."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=5))
    attention, constants = FusedAttention(torch.device("cpu")), build_constants(Case(batch=1).kv.codec)
    first = weakref.ref(attention.anchors_of(constants, 10))
    longer = attention.anchors_of(constants, 1000)
    assert first() is not None and first() is not longer and len(longer) >= 504 and torch.equal(first(), longer[: len(first())])
    assert attention.anchors_of(constants, 10) is longer


@pytest.mark.gpu
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_kernel_on_the_device(options: dict[str, Any]) -> None:
    case = Case(**options, device="cuda")
    fused = FusedAttention(torch.device("cuda", 0))
    got = fused.attend(case.query, case.kv, None, case.softcap, case.sinks)
    assert relative_rms(got, case.want()) < ERROR[got.dtype]
    assert torch.equal(got, fused.attend(case.query, case.kv, None, case.softcap, case.sinks))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_kernel_reads_a_prefix_on_the_device(dim: int) -> None:
    case, fused = Case(dim=dim, batch=3, tokens=1500, dtype=torch.bfloat16, device="cuda"), FusedAttention(torch.device("cuda", 0))
    want = fused.attend(case.query, case.kv)
    for units in (1, 6):
        assert torch.equal(fused.attend(case.query, with_prefix(case.kv, units)), want)


@pytest.mark.gpu
def test_kernel_on_random_shapes() -> None:
    """Hundreds of them, each twice with the same bits."""
    fused, wrong = FusedAttention(torch.device("cuda", 0)), []
    for seed in range(300):
        options = random_options(seed)
        case = Case(**options, device="cuda")
        got = fused.attend(case.query, case.kv)
        if not torch.equal(got, fused.attend(case.query, case.kv)) or relative_rms(got, case.want()) >= ERROR[got.dtype]:
            wrong.append((seed, options, relative_rms(got, case.want())))
    assert not wrong
