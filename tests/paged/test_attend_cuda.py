"""The fused kernel on pages: the same bits as on contiguous stores of the same content, and close to what PyTorch makes of the pages. On the host, where
every thread is a fiber, and with a GPU on the device."""

import shutil
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cache import PagedCache, Sequence, codec_of, sequence_of
from host_attention import attend_on_host, launch_on_host
from torch import Tensor

from spectralquant.attention.cuda import FusedAttention, Workspace, anchor_table, plan_launch, runs_of
from spectralquant.attention.cuda import Launch as AttentionLaunch
from spectralquant.attention.kernel_constants import build_constants
from spectralquant.codec.layout import UNIT
from spectralquant.codec.packed import PackedKV
from spectralquant.config import Backend
from spectralquant.errors import BackendError, ShapeError
from spectralquant.kernels.launch import Launch
from spectralquant.paged.attend_cuda import PagedAttention, plan_attend
from spectralquant.paged.layer import PagedLayer, Scoring
from spectralquant.paged.layout import from_8_bits
from spectralquant.paged.recent import Step
from spectralquant.paged.view import packed_view

MACHINES = [
    pytest.param("cpu", id="host", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")),
    pytest.param("cuda", id="device", marks=pytest.mark.gpu),
]
ERROR = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative RMS of the output, as tests/attention/test_cuda.py has it."""
GARBAGE, INFINITE = 0xFF, -128
"""A byte of NaN in every type, and an exponent of 8 bits beyond those of floats."""

LENGTHS = [1, 127, 128, 300, 385, 700]
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16, longer rows": {"dtype": torch.float16, "spare": 256},
    "plain frame": {"anchored": False},
    "head size 128": {"dim": 128, "heads": 1, "groups": 4, "dtype": torch.bfloat16},
    "head size 128, plain frame": {"dim": 128, "heads": 1, "groups": 4, "anchored": False, "dtype": torch.float16},
    "7 heads, 5 entries": {"groups": 7, "exact": 5, "dtype": torch.float16},
    "one entry": {"exact": 1, "dtype": torch.float16},
    "33 entries": {"exact": 33, "dtype": torch.float16},
    "no missing mass": {"mass": False, "dtype": torch.float16},
    "soft-cap and sinks": {"softcap": 5.0, "sinks": True, "dtype": torch.float16},
    "few sequences of many": {"lengths": [128 * n + 5 for n in (1, 9, 2)], "dtype": torch.float16},
}


class Case:
    """Sequences with one new token each, stored; after `attend` everything that must not be read is NaN.

    lengths: tokens before. lost: sequences whose exact copies of the last full page (0) or of the one after (1) have gone. absent: sequences that have no
    new token.
    """

    def __init__(
        self, machine: str = "cpu", lengths: list[int] = LENGTHS, dim: int = 64, heads: int = 2, groups: int = 3, anchored: bool = True, mass: bool = True,
        dtype: torch.dtype = torch.float32, exact: int = 4, spare: int = 0, softcap: float | None = None, sinks: bool = False,
        lost: tuple[tuple[int, int], ...] = (), absent: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.device = torch.device(machine)
        codec = codec_of(heads, dim, anchored, machine, groups if mass else 0)
        self.scoring = Scoring(None, softcap, torch.randn(heads * groups).to(machine) if sinks else None)
        self.cache = PagedCache(codec, 64, 24, dtype, self.scoring, exact, spare, backend="reference")
        self.work = [sequence_of(codec, n + 1, 1000 * i + n, (n // 2, n // 3), dtype) for i, n in enumerate(lengths)]
        for sequence, length in zip(self.work, lengths, strict=True):
            if length:
                take(self.cache, [(sequence, length)])
        for which, unit in lost:
            page = self.work[which].pages[lengths[which] // UNIT - 1 + unit]
            self.layer.layout.serials(self.cache.pages)[page] += 1
        self.step, self.keys, self.values = take(self.cache, [(s, int(i not in absent)) for i, s in enumerate(self.work)])
        self.query = 1.5 * torch.randn(len(self.keys), heads * groups, dim).to(self.keys)
        self.constants = build_constants(codec)

    @property
    def layer(self) -> PagedLayer:
        return self.cache.layer

    def reference(self) -> Tensor:
        """[N, H G, D] by PyTorch, of float32 queries."""
        out = torch.full_like(self.query, torch.nan, dtype=torch.float32)
        self.layer.attend(self.query.float(), self.keys.float(), self.values.float(), self.cache.pages, self.step, self.scoring, out)
        return out

    def poison(self) -> None:
        """NaN into all that belongs to none of the sequences: unused entries, other pages, exact copies of nothing."""
        layout, pages = self.layer.layout, self.cache.pages
        owned = torch.tensor([page for s in self.work for page in s.pages], device=self.device)
        other = torch.ones(len(pages), dtype=torch.bool, device=self.device).index_fill(0, owned, False)
        pages[other] = GARBAGE
        unused = (layout.places(pages) < 0)[:, None, None]
        layout.exponents(pages).masked_fill_(unused, INFINITE)
        read = self.step.read_copies[self.step.read_copies >= 0]
        rows = torch.ones(len(self.layer.recent_keys) // UNIT, dtype=torch.bool, device=self.device).index_fill(0, read, False).repeat_interleave(UNIT)
        self.layer.recent_keys[rows] = self.layer.recent_values[rows] = torch.nan

    def attend(self, blocks: int) -> tuple[Tensor, Tensor]:
        """[N, H G, D], NaN before, by the kernel, and lengths [B, 2]."""
        self.poison()
        out = torch.full_like(self.query, torch.nan)
        anchors = anchor_table(self.constants, runs_of(self.step.table.shape[1], self.constants.definitions["RUN"]), self.device)
        counting, attention = plan_attend(
            self.constants, anchors, self.layer.layout, (self.layer.recent_keys, self.layer.recent_values), self.query, self.keys, self.values,
            self.cache.pages, self.step, None, self.scoring.softcap, self.scoring.sinks, out, blocks,
        )  # fmt: skip
        if self.device.type == "cpu":
            launch_on_host(counting)
            attend_on_host(attention)
        else:
            PagedAttention(self.device).run(counting, attention)
        return out, counting.arguments[6].view(-1, 2)

    def contiguous(self, which: list[int], lengths: Tensor, blocks: int) -> Tensor:
        """[sequences, H G, D] of the sequences `which`, all of the same lengths [2], by the kernel on stores that have what their pages have."""
        layout, dtype, (units, raw) = self.layer.layout, self.layer.exact_dtype, lengths.tolist()
        own = self.cache.pages[self.step.table[which, :units].long()]  # [B, units, page_bytes]
        places = layout.places(own)
        slots = torch.where(places >= 0, places.int() + UNIT * torch.arange(units, device=self.device)[:, None], -1).flatten(1)
        exact = from_8_bits(layout.integers(own), layout.exponents(own), dtype).permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # [2, B, H, E of all, D]
        keys, values = exact.masked_fill((slots < 0)[:, None, :, None], 0.0)
        behind = slice(UNIT * units, UNIT * units + raw)
        raw_keys = torch.stack([self.work[i].keys[:, behind] for i in which]).to(dtype)
        raw_values = torch.stack([self.work[i].values[:, behind] for i in which]).to(dtype)
        start = torch.zeros(len(which), dtype=torch.int64, device=self.device)
        kv = PackedKV(
            self.layer.codec, layout.records(own).transpose(1, 2).contiguous(), UNIT * units, keys, values, slots.int(), raw_keys, raw_values, start,
            (0,) * len(which), lengths.expand(len(which), -1), self.query.dtype, 2048, True,
        )  # fmt: skip
        query = self.query[self.step.starts[which]][:, :, None]
        anchors = anchor_table(self.constants, runs_of(units, self.constants.definitions["RUN"]), self.device)
        workspace = Workspace.make(*Workspace.sizes(query, len(which), layout.heads, blocks), blocks, self.device)
        launch = plan_launch(query, kv, self.constants, anchors, workspace, None, self.scoring.softcap, self.scoring.sinks)
        if self.device.type == "cpu":
            attend_on_host(launch)
        else:
            FusedAttention(self.device).launch(launch)
        return launch.out[:, 0]


def take(cache: PagedCache, work: list[tuple[Sequence, int]]) -> tuple[Step, Tensor, Tensor]:
    """The next so many tokens of sequences into the cache."""
    step, keys, values = cache.plan(work, padding=3)
    cache.layer.store(cache.pages, keys, values, step)
    for sequence, count in work:
        sequence.length += count
    return step, keys, values


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def check(case: Case) -> Tensor:
    """Against PyTorch, and against each sequence by itself on a contiguous store; returns lengths. Tokens of no sequence are left alone."""
    units = case.layer.packed_units(case.cache.pages, case.step)
    want = case.reference()
    there = ~want[:, 0, 0].isnan()
    present = (case.step.after > case.step.before).nonzero()[:, 0].tolist()
    assert there.sum() == len(present)
    for blocks in (1, 6):
        got, lengths = case.attend(blocks)
        assert got[~there].isnan().all() and torch.equal(lengths[present, 0], units[present].int())
        assert relative_rms(got[there], want[there]) < ERROR[got.dtype]
    got, lengths = case.attend(1)  # one block takes whole sequences, as if each were alone
    for i in present:
        assert torch.equal(got[case.step.starts[i]], case.contiguous([i], lengths[i], 1)[0])
    return lengths


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_kernel_on_pages(options: dict[str, Any], machine: str) -> None:
    check(Case(machine, **options))


@pytest.mark.parametrize("machine", MACHINES)
def test_kernel_reads_codes_where_copies_are_gone(machine: str) -> None:
    """Of the page before, of the page that is written to, and of both; the new token itself is then read by its code."""
    lost = ((0, 1), (1, 0), (2, 1), (3, 0), (3, 1), (4, 0))
    case = Case(machine, [20, 300, 383, 511, 512, 700], dtype=torch.bfloat16, lost=lost)
    assert check(case).tolist() == [[1, 0], [2, 45], [3, 0], [4, 0], [4, 1], [4, 189]]


@pytest.mark.parametrize("machine", MACHINES)
def test_kernel_leaves_out_sequences_without_a_new_token(machine: str) -> None:
    """In between and at the end, where a server pads a batch."""
    lengths = check(Case(machine, [300, 400, 50, 0, 0], dtype=torch.float16, absent=(1, 3, 4)))
    assert (lengths.sum(-1) > 0).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("blocks", [3, 40, 132])
def test_kernel_shares_out_pages_as_it_does_contiguous_stores(blocks: int, machine: str) -> None:
    case = Case(machine, [897] * 3, dtype=torch.bfloat16)
    got, lengths = case.attend(blocks)
    assert torch.equal(got[:3], case.contiguous([0, 1, 2], lengths[0], blocks))


def test_kernel_needs_tensors_that_it_can_read() -> None:
    case = Case(lengths=[300])
    out, pages = torch.empty_like(case.query), case.cache.pages
    rest = (case.constants, case.constants.turns, case.layer.layout, (case.layer.recent_keys, case.layer.recent_values), case.query, case.keys, case.values)
    with pytest.raises(ShapeError, match=r"pages have strides .* multiples of 16"):
        plan_attend(*rest, torch.zeros(8, pages.shape[1] + 4, dtype=torch.uint8)[:, :-4], case.step, None, None, None, out, 1)
    with pytest.raises(ShapeError, match=r"out has strides .* contiguous"):
        plan_attend(*rest, pages, case.step, None, None, None, out.transpose(0, 1), 1)


def test_layer_refuses_kernels_that_cannot_run() -> None:
    with pytest.raises(BackendError, match="not on an NVIDIA GPU"):
        PagedLayer(codec_of(), torch.float32, 4, 1, 8, backend="cuda")


class HostAttention(PagedAttention):
    """On the host."""

    steps = 0

    def run(self, counting: Launch, attention: AttentionLaunch) -> None:
        launch_on_host(counting)
        attend_on_host(attention)
        self.steps += 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_layer_hands_steps_of_single_tokens_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the end of a page. Steps with more tokens get no kernels here, which they would have on a GPU."""
    monkeypatch.setattr("spectralquant.paged.layer.packed_view", lambda *arguments: packed_view(*arguments[:7]))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=5))
    codec, kernel, made = codec_of(), HostAttention(torch.device("cpu")), []
    for attention in (None, kernel):
        cache, work = PagedCache(codec), [sequence_of(codec, 400, seed=n) for n in (1, 2)]
        cache.layer.kernel = attention
        made.append([cache.step(list(zip(work, counts, strict=True))) for counts in ([127, 300], [1, 1], [1, 1], [1, 1], [2, 1])])
    assert kernel.steps == 3
    for want, got in zip(*made, strict=True):
        for (_, x), (_, y) in zip(want, got, strict=True):
            assert relative_rms(y, x) < ERROR[torch.float32]


@pytest.mark.gpu
def test_layer_on_the_device() -> None:
    """As PyTorch, step by step, over the ends of pages."""
    codec, lengths, made = codec_of(device="cuda", groups=2), [1, 127, 300, 700], []
    backends: tuple[Backend, ...] = ("reference", "cuda")
    for backend in backends:
        cache, work = PagedCache(codec, dtype=torch.bfloat16, backend=backend), [sequence_of(codec, n + 150, n, (n // 2,), torch.bfloat16) for n in lengths]
        cache.layer.writer = None  # codes up to rounding are not the point here
        counts = [lengths, *[[1] * len(lengths)] * 140]
        made.append([cache.step(list(zip(work, count, strict=True))) for count in counts])
    for want, got in zip(*made, strict=True):
        for (_, x), (_, y) in zip(want, got, strict=True):
            assert relative_rms(y, x.float()) < 2 * ERROR[torch.bfloat16]  # both are rounded


@pytest.mark.gpu
def test_step_as_a_cuda_graph() -> None:
    """A layer's `store` and `attend`, captured once and replayed, over the ends of pages: the same bits as launched one by one."""
    codec, lengths, dtype = codec_of(device="cuda", groups=2), [1, 120, 300, 700], torch.bfloat16
    eager, graphed = (PagedCache(codec, dtype=dtype, backend="cuda") for _ in range(2))
    work = [[sequence_of(codec, n + 50, n, (n // 2,), dtype) for n in lengths] for _ in range(2)]
    for cache, sequences in zip((eager, graphed), work, strict=True):
        take(cache, list(zip(sequences, lengths, strict=True)))
    held = next_inputs(graphed, work[1])
    query = torch.randn(len(held.keys), 4, 64, device="cuda", dtype=dtype)
    out = torch.zeros_like(query)

    def run() -> None:
        graphed.layer.store(graphed.pages, held.keys, held.values, held.step)
        graphed.layer.attend(query, held.keys, held.values, graphed.pages, held.step, Scoring(), out)

    graph = torch.cuda.CUDAGraph()
    for index in range(40):
        new, want = next_inputs(eager, work[0]), torch.zeros_like(query)
        query.normal_()
        eager.layer.store(eager.pages, new.keys, new.values, new.step)
        eager.layer.attend(query, new.keys, new.values, eager.pages, new.step, Scoring(), want)
        if index == 0:
            run()
            torch.cuda.synchronize()
            assert torch.equal(out, want)
            with torch.cuda.graph(graph):
                run()
        else:
            held.take(next_inputs(graphed, work[1]))
            out.zero_()
            graph.replay()
        assert torch.equal(out, want), index


@dataclass
class Inputs:
    """Of a step, in tensors of fixed shapes."""

    step: Step
    keys: Tensor
    values: Tensor

    def take(self, other: "Inputs") -> None:
        """What `other` has, in the same memory."""
        self.keys.copy_(other.keys), self.values.copy_(other.values)
        for field in fields(Step):
            to = getattr(self.step, field.name)
            if isinstance(to, Tensor) and field.name != "copy_serials":  # which is the cache's own
                to.copy_(getattr(other.step, field.name))


def next_inputs(cache: PagedCache, sequences: list[Sequence]) -> Inputs:
    """One more token of each."""
    step, keys, values = cache.plan([(s, 1) for s in sequences], padding=3)
    for sequence in sequences:
        sequence.length += 1
    return Inputs(replace(step, table=torch.nn.functional.pad(step.table, (0, 8 - step.table.shape[1]))), keys, values)
