"""Decode attention on packed codes against FP16 attention on one GPU: time, share of the memory bandwidth, error.

    python benchmarks/attention.py [--only TEXT] [--quick] --out FILE

Every line is one shape: KV heads times batch, context, head size, query heads per KV head, preset, frame. Ours reads codes, 4 sinks, as many
other exact tokens as the preset's promise leaves, and an exact window of 128 tokens; FP16 is torch's `scaled_dot_product_attention(enable_gqa=True)`
over all of them. Both are timed in the same run as a CUDA graph of calls over several caches, together larger than 300 MB, so that none comes from the
L2 cache; the time of a call is that of the graph divided by its calls, the median of several replays. Codes are random bits: the kernel's time does not
depend on them.

`copy_share` divides the bytes that ours has to read by its time and by the bandwidth of a large copy by a kernel (bytes read and written). `error` is the
relative root mean square against float64 attention over the decoded cache; `sdpa_error` is that of FP16 attention over the same.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from calibration import command_line
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spectralquant.attention.cuda import THREADS, FusedAttention
from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.codec.layout import UNIT
from spectralquant.codec.packed import PackedKV
from spectralquant.config import Dials
from spectralquant.files import write_json
from spectralquant.presets import PRESETS
from spectralquant.profile import Choices, LayerProfile, Profile, SideProfile
from spectralquant.rope import Rotary

WINDOW, SINKS = 128, 4
BEYOND_L2, REPLAYS = 300 << 20, 15


@dataclass(frozen=True, slots=True)
class Shape:
    batch: int
    context: int
    dim: int = 128
    groups: int = 4
    preset: str = "high"
    anchored: bool = True
    heads: int = 8

    @property
    def label(self) -> str:
        frame = "anchored" if self.anchored else "plain"
        return f"{self.heads * self.batch} x {self.context:,} D={self.dim} G={self.groups} {self.preset} {frame}"


def shapes(quick: bool) -> list[Shape]:
    sizes = [(1, 8192), (1, 32_768), (1, 131_072), (8, 8192), (8, 32_768), (32, 8192), (8, 131_072)]
    main = [Shape(batch, context, anchored=anchored) for batch, context in sizes for anchored in (True, False)]
    if quick:
        return main
    other = [{"dim": 64}, {"dim": 256}, {"groups": 1}, {"groups": 7}, {"groups": 8}, {"preset": "standard"}, {"preset": "ultra"}]
    return main + [Shape(batch, context, **kind) for kind in other for batch, context in ((1, 131_072), (8, 32_768))]


def made_up_sides(heads: int, dim: int) -> tuple[SideProfile, SideProfile]:
    """K and V of a layer whose spectra fall by e^4."""
    make = torch.Generator().manual_seed(0)

    def side() -> SideProfile:
        basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=make))[0]
        variance = torch.exp(-4.0 * torch.arange(dim) / dim).expand(heads, dim)
        return SideProfile(torch.randn(heads, dim, generator=make), basis, variance.contiguous())

    return side(), side()


def make_codec(shape: Shape, device: torch.device, quantizer: str = "uniform") -> LayerCodec:
    """A codec of made-up spectra: its constants have the shapes of real ones."""
    heads, dim = shape.heads, shape.dim
    key, value = made_up_sides(heads, dim)
    rotary = Rotary(1e6 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))) if shape.anchored else None
    layer = LayerProfile(key, value, torch.ones(heads), 10.0, rotary)
    return build_codec(Profile({0: layer}, Choices(planes_first=True), {}, {}), PRESETS[shape.preset], Dials(), device, quantizer)[0]


def make_cache(codec: LayerCodec, shape: Shape, seed: int, device: torch.device) -> PackedKV:
    """Random codes, with gains around 1 and masked slots where tokens are exact."""
    make = torch.Generator(device).manual_seed(seed)
    heads, dim, layout = shape.heads, shape.dim, codec.layout
    packed = (shape.context - WINDOW) // UNIT * UNIT
    units, exact = packed // UNIT, SINKS + int(codec.exact_bound * packed)
    records = torch.randint(0, 256, (shape.batch, heads, units, layout.record_bytes), dtype=torch.uint8, device=device, generator=make)
    slots = torch.randperm(packed - SINKS, device=device, generator=make)[: exact - SINKS].sort().values + SINKS
    slots = torch.cat([torch.arange(SINKS, device=device), slots])
    row, a0, j = slots % 8, slots // 8 % 2, slots // 16 % 8
    _, key_gain, _, value_gain = layout.split(records)
    for gain in (key_gain, value_gain):
        gain.copy_(torch.randint(124, 133, gain.shape, dtype=torch.uint8, device=device, generator=make))
        gain[:, :, slots // UNIT, 16 * row + 8 * a0 + j] = 0

    def vectors(count: int) -> Tensor:
        return torch.randn(shape.batch, heads, count, dim, device=device, dtype=torch.float16, generator=make)

    raw = shape.context - packed
    start = torch.zeros(shape.batch, dtype=torch.int64, device=device)
    lengths = torch.tensor([[units, raw]], dtype=torch.int32, device=device).repeat(shape.batch, 1)
    exact_slots = slots.int().expand(shape.batch, -1).contiguous()
    return PackedKV(
        codec,
        records,
        packed,
        vectors(exact),
        vectors(exact),
        exact_slots,
        vectors(raw),
        vectors(raw),
        start,
        (0,) * shape.batch,
        lengths,
        torch.float16,
        32_768,
        True,
    )


def bytes_read(kv: PackedKV) -> int:
    return sum(t.nbytes for t in (kv.records, kv.exact_keys, kv.exact_values, kv.raw_keys, kv.raw_values))


def time_graph(calls: list[Callable[[], object]]) -> float:
    """Microseconds per call of a CUDA graph of all calls, the median of REPLAYS."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times[3:])[REPLAYS // 2]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of 2 GB that are copied by a kernel (a copy node of a graph goes another way, and slower)."""
    source = torch.empty(1 << 29, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (time_graph([lambda: torch.neg(source, out=target)] * 4) * 1e-6)


def exact_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """float64 attention [B, Hq, 1, D], one KV head at a time."""
    groups, out = query.shape[1] // keys.shape[1], []
    for b in range(len(query)):
        for h in range(keys.shape[1]):
            q = query[b, h * groups : (h + 1) * groups, 0].double()
            weights = (q @ keys[b, h].double().T * query.shape[-1] ** -0.5).softmax(-1)
            out.append(weights @ values[b, h].double())
    return torch.stack(out).view(query.shape)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def measure(shape: Shape, device: torch.device, bandwidth: float) -> dict[str, Any]:
    codec, fused = make_codec(shape, device), FusedAttention(device)
    caches = [make_cache(codec, shape, 0, device)]
    copies = max(4, -(-BEYOND_L2 // bytes_read(caches[0])))
    caches += [make_cache(codec, shape, seed, device) for seed in range(1, copies)]
    make = torch.Generator(device).manual_seed(99)
    query = torch.randn(shape.batch, shape.heads * shape.groups, 1, shape.dim, device=device, dtype=torch.float16, generator=make)
    began = time.perf_counter()
    launches = [fused.plan(query, kv) for kv in caches]
    fused.run(launches[0])
    torch.cuda.synchronize()
    first_use = time.perf_counter() - began
    launches[0].out.fill_(float("nan"))
    got = fused.run(launches[0]).clone()
    ours = time_graph([lambda launch=launch: fused.run(launch) for launch in launches])
    same = torch.equal(got, fused.run(launches[0]))
    read, records = bytes_read(caches[0]), codec.layout
    keys, values = (caches[0].dense(which) for which in ("key", "value"))
    del caches, launches
    want = exact_attention(query, keys.float(), values.float())
    dense = [(keys, values)]
    copies = max(3, -(-BEYOND_L2 // (2 * keys.nbytes)))
    dense += [(torch.randn_like(keys), torch.randn_like(values)) for _ in range(copies - 1)]
    sdpa = time_graph([lambda k=k, v=v: scaled_dot_product_attention(query, k, v, enable_gqa=True) for k, v in dense])
    return {
        "shape": shape.label, **asdict(shape), "planes": [records.key_planes, records.value_planes],
        "us": ours, "sdpa_us": sdpa, "ratio": sdpa / ours, "byte_ratio": 2 * keys.nbytes / read,
        "copy_share": read / (ours * 1e-6) / bandwidth, "sdpa_copy_share": 2 * keys.nbytes / (sdpa * 1e-6) / bandwidth,
        "error": relative(got, want), "sdpa_error": relative(scaled_dot_product_attention(query, keys, values, enable_gqa=True), want),
        "same_again": same, "first_use_s": first_use,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="shapes whose label holds this text")
    parser.add_argument("--quick", action="store_true", help="head size 128, 4 query heads per KV head, preset high only")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    bandwidth = copy_bandwidth(device)
    document: dict[str, Any] = {
        "command": command_line("attention", sys.argv[1:]),
        "card": torch.cuda.get_device_name(device),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "cuda-core")}, "cuda": torch.version.cuda},
        "copy_bytes_per_s": bandwidth,
        "threads_per_block": THREADS,
        "rows": [],
    }
    print(f"{document['card']}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    for shape in shapes(args.quick):
        if args.only not in shape.label:
            continue
        row = measure(shape, device, bandwidth)
        torch.cuda.empty_cache()
        document["rows"].append(row)
        told = " ".join(f"{k} {row[k]:.3g}" for k in ("us", "sdpa_us", "ratio", "byte_ratio", "copy_share", "error", "sdpa_error", "first_use_s"))
        print(f"{row['shape']:45s} {told} {'' if row['same_again'] else 'NOT THE SAME AGAIN'}", flush=True)
        write_json(Path(args.out), document)


if __name__ == "__main__":
    main()
