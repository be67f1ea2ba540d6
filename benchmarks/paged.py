"""Decode attention and writing on pages on one GPU: against the same kernel on contiguous stores, and against FP16 attention.

    python benchmarks/paged.py --out FILE

`attention`: a step of one new token per sequence, half a page after the end of its last full one, over pages in random order, as benchmarks/attention.py
measures it: CUDA graphs of calls over several caches that together are larger than the L2 cache, the median of several replays. Ours on pages is both launches
of `PagedLayer.attend`; the contiguous kernel reads what benchmarks/attention.py has it read. `error` is the relative root mean square against attention of
the same pages in PyTorch.

`store`: `PagedLayer.store` of the next token of so many sequences, by kernels and by PyTorch, launched one by one and as a CUDA graph.
"""

import argparse
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from attention import BEYOND_L2, Shape, bytes_read, make_cache, make_codec, time_graph
from calibration import command_line
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spectralquant.attention.cuda import FusedAttention
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import MASKED_GAIN, UNIT
from spectralquant.files import write_json
from spectralquant.paged.layer import PagedLayer, Scoring
from spectralquant.paged.layout import PageLayout, token_bytes
from spectralquant.paged.recent import HELD_UNITS, Step

SHAPES = [Shape(1, 8192), Shape(1, 32_768), Shape(8, 32_768)]
NEW_TOKENS = (1, 8, 64, 256)
EXACT, SINKS, BEHIND = 8, 1, UNIT // 2
USED = (0, 1, 4)
"""Tokens of every page that stand apart from its codes: most layers have none, those with secondary attention sinks a few."""
DTYPE = torch.float16


class Pages:
    """Pages of several batches of sequences, in random order, with random codes and gains around 1; their exact copies hold what they hold."""

    def __init__(self, codec: LayerCodec, shape: Shape, batches: int, device: torch.device, used: int = 0) -> None:
        self.make = torch.Generator(device).manual_seed(7)
        self.shape, self.device, units = shape, device, shape.context // UNIT
        self.layer = PagedLayer(codec, DTYPE, EXACT, SINKS, HELD_UNITS * shape.batch * batches, backend="cuda")
        layout, count = self.layer.layout, batches * shape.batch * units + 1
        self.pages = torch.randint(0, 256, (count, layout.page_bytes), dtype=torch.uint8, device=device, generator=self.make)
        self._fill(layout, used)
        self.layer.recent_keys.normal_(generator=self.make), self.layer.recent_values.normal_(generator=self.make)
        order = torch.randperm(count - 1, device=device, generator=self.make) + 1  # page 0 is nobody's
        self.tables = order.view(batches, shape.batch, units).int()

    def _fill(self, layout: PageLayout, used: int) -> None:
        places = torch.rand(len(self.pages), UNIT, device=self.device, generator=self.make).argsort(-1)[:, :used].sort(-1).values
        layout.places(self.pages)[:] = torch.nn.functional.pad(places, (0, EXACT - used), value=-1).to(torch.int8)
        layout.exponents(self.pages).fill_(-6)
        records, gains = layout.records(self.pages), token_bytes(layout.record, self.device).gains
        shape = (*records.shape[:2], gains.numel())
        records[:, :, gains.flatten()] = torch.randint(124, 133, shape, dtype=torch.uint8, device=self.device, generator=self.make)
        page = torch.arange(len(self.pages), device=self.device)[:, None, None]
        records[page, :, gains[places].flatten(1)[:, None]] = MASKED_GAIN

    def step(self, batch: int) -> Step:
        """The next token of every sequence of a batch."""
        table, sequences = self.tables[batch], self.shape.batch
        before = torch.full((sequences,), self.shape.context - BEHIND, device=self.device)
        read_pages, token = table[:, -HELD_UNITS:].long(), torch.arange(sequences, device=self.device)
        copies = torch.arange(sequences * HELD_UNITS, device=self.device).view(-1, HELD_UNITS) + batch * sequences * HELD_UNITS
        serials = torch.arange(len(self.layer.recent_keys) // UNIT, device=self.device) + 1
        self.layer.layout.serials(self.pages)[read_pages] = serials[copies]
        slots = read_pages[:, -1] * UNIT + before % UNIT
        rows = copies[:, -1] * UNIT + before % UNIT
        starts = torch.arange(sequences + 1, device=self.device)
        return Step(table, before, before + 1, starts, slots, before[token], serials[copies[:, -1]], rows, read_pages, copies, serials, 1)

    def vectors(self, heads: int) -> Tensor:
        return torch.randn(self.shape.batch, heads, self.shape.dim, device=self.device, dtype=DTYPE, generator=self.make)


def measure(shape: Shape, device: torch.device, used: int) -> dict[str, Any]:
    codec = make_codec(shape, device)
    paged, error = measure_pages(codec, shape, device, used)
    contiguous, sdpa = measure_contiguous(codec, shape, device), measure_sdpa(shape, device)
    return {
        "shape": shape.label, **asdict(shape), "exact": EXACT, "used": used, "us": paged, "contiguous_us": contiguous, "sdpa_us": sdpa, "ratio": sdpa / paged,
        "to_contiguous": paged / contiguous, "error": error,
    }  # fmt: skip


def measure_pages(codec: LayerCodec, shape: Shape, device: torch.device, used: int) -> tuple[float, float]:
    """Microseconds and error."""
    page_bytes = PageLayout(codec.layout, shape.heads, shape.dim, EXACT).page_bytes
    pages = Pages(codec, shape, copies_of(shape.batch * shape.context // UNIT * page_bytes), device, used)
    steps = [pages.step(batch) for batch in range(len(pages.tables))]
    query, key, value = (pages.vectors(heads) for heads in (shape.heads * shape.groups, shape.heads, shape.heads))
    outs = [torch.empty_like(query) for _ in steps]

    def attend(step: Step, out: Tensor) -> None:
        pages.layer.attend(query, key, value, pages.pages, step, Scoring(), out)

    us = time_graph([lambda step=step, out=out: attend(step, out) for step, out in zip(steps, outs, strict=True)])
    pages.layer.kernel, want = None, torch.empty_like(query, dtype=torch.float32)
    pages.layer.attend(query.float(), key.float(), value.float(), pages.pages, steps[0], Scoring(), want)
    return us, float((outs[0].float() - want).norm() / want.norm())


def measure_contiguous(codec: LayerCodec, shape: Shape, device: torch.device) -> float:
    fused, caches = FusedAttention(device), [make_cache(codec, shape, 0, device)]
    caches += [make_cache(codec, shape, seed, device) for seed in range(1, copies_of(bytes_read(caches[0])))]
    query = torch.randn(shape.batch, shape.heads * shape.groups, 1, shape.dim, device=device, dtype=DTYPE)
    launches = [fused.plan(query, kv) for kv in caches]
    return time_graph([lambda launch=launch: fused.run(launch) for launch in launches])


def measure_sdpa(shape: Shape, device: torch.device) -> float:
    query = torch.randn(shape.batch, shape.heads * shape.groups, 1, shape.dim, device=device, dtype=DTYPE)
    keys = torch.randn(shape.batch, shape.heads, shape.context, shape.dim, device=device, dtype=DTYPE)
    dense = [(torch.randn_like(keys), torch.randn_like(keys)) for _ in range(copies_of(2 * keys.nbytes))]
    return time_graph([lambda k=k, v=v: scaled_dot_product_attention(query, k, v, enable_gqa=True) for k, v in dense])


def copies_of(size: int) -> int:
    """Caches of so many bytes that are together larger than the L2 cache."""
    return max(4, -(-BEYOND_L2 // size))


def measure_store(new: int, quantizer: str, kernels: bool, device: torch.device) -> dict[str, Any]:
    shape = Shape(new, 2 * UNIT)
    codec = make_codec(shape, device, quantizer)
    pages = Pages(codec, shape, 1, device)
    if not kernels:
        pages.layer.writer = None
    step, new_keys, new_values = pages.step(0), pages.vectors(shape.heads), pages.vectors(shape.heads)

    def store() -> None:
        pages.layer.store(pages.pages, new_keys, new_values, step)

    capturable = kernels or quantizer != "joint"  # PyTorch's joint search factors a matrix, which waits for the device
    graphed, times = time_graph([store]) if capturable else None, []
    for _ in range(7):
        began = time.perf_counter()
        store()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e6)
    return {"new_tokens": new, "quantizer": quantizer, "kernels": kernels, "graph_us": graphed, "eager_us": sorted(times)[3]}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    document: dict[str, Any] = {
        "command": command_line("paged", sys.argv[1:]),
        "card": torch.cuda.get_device_name(device),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "cuda-core")}, "cuda": torch.version.cuda},
        "attention": [],
        "store": [],
    }
    for shape, used in product(SHAPES, USED):
        row = measure(shape, device, used)
        torch.cuda.empty_cache()
        document["attention"].append(row)
        print(
            f"{row['shape']:45s} {used} " + " ".join(f"{k} {row[k]:.3g}" for k in ("us", "contiguous_us", "sdpa_us", "ratio", "to_contiguous", "error")),
            flush=True,
        )
        write_json(Path(args.out), document)
    for quantizer in ("uniform", "joint"):
        for new, kernels in product(NEW_TOKENS, (True, False)):
            row = measure_store(new, quantizer, kernels, device)
            document["store"].append(row)
            by = "kernels" if kernels else "PyTorch"
            print(f"store {quantizer:8s} {new:4d} tokens by {by}: graph {row['graph_us']} us, eager {row['eager_us']:.1f} us", flush=True)
            write_json(Path(args.out), document)


if __name__ == "__main__":
    main()
