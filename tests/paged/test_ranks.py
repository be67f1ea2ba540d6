"""Heads of a layer over several processes: each writes its own, and they decide together which tokens stand apart from their codes."""

import threading

import synthetic
import torch
from cache import EXACT, SINKS
from torch import Tensor

from spectralquant.codec.codec import build_codec
from spectralquant.codec.layout import UNIT
from spectralquant.config import Dials
from spectralquant.paged.layer import PagedLayer
from spectralquant.paged.recent import RecentPages
from spectralquant.presets import PRESETS
from spectralquant.rope import Rotary


def test_ranks_write_the_bytes_that_one_process_writes() -> None:
    heads, ranks, tokens = 4, 2, 300
    profile = synthetic.profile(heads, 64, (0,), rotary=Rotary(synthetic.inv_freq(32)), exact_share=0.02)
    keys, values = (torch.randn(tokens, heads, 64) for _ in range(2))
    values[::37] *= 0.01
    values[::41, :2] *= 0.05  # small for one rank's heads, not for the other's
    slots, table = UNIT + torch.arange(tokens), torch.tensor([[1, 2, 3]])
    barrier, seen = threading.Barrier(ranks), [torch.empty(0)] * ranks

    def write(part: slice, rank: int | None, out: list[PagedLayer | Tensor]) -> None:
        def average(x: Tensor) -> Tensor:
            assert rank is not None
            seen[rank] = x
            barrier.wait()
            mean = torch.stack(seen).mean(0)
            barrier.wait()
            return mean

        codec = build_codec(profile, PRESETS["high"], Dials(), heads=part)[0]
        layer = PagedLayer(codec, torch.float32, EXACT, SINKS, 4, average=None if rank is None else average)
        pages = torch.zeros(4, layer.layout.page_bytes, dtype=torch.uint8)
        step = RecentPages(4, 4, torch.device("cpu")).advance(table, torch.tensor([0]), torch.tensor([tokens]), torch.tensor([0, tokens]), slots, tokens)
        layer.store(pages, keys[:, part], values[:, part], step)
        out += [layer, pages]

    whole: list[PagedLayer | Tensor] = []
    write(slice(None), None, whole)
    parts: list[list[PagedLayer | Tensor]] = [[], []]
    threads = [threading.Thread(target=write, args=(slice(2 * r, 2 * r + 2), r, parts[r])) for r in range(ranks)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    layer, pages = whole
    for r, (own, written) in enumerate(parts):
        part = slice(2 * r, 2 * r + 2)
        assert torch.equal(own.layout.places(written[1:]), layer.layout.places(pages[1:]))
        assert torch.equal(own.layout.records(written[1:]), layer.layout.records(pages[1:])[:, part])
    assert (layer.layout.places(pages[1:]) >= 0).sum() > 3
