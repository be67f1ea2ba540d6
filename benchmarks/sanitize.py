"""Every CUDA kernel of this package a few times on small shapes, for NVIDIA's compute-sanitizer, which slows kernels down a thousandfold.

    compute-sanitizer --tool racecheck --kernel-name kns=attend --error-exitcode 9 python benchmarks/sanitize.py [HEAD_SIZE ...]

One layer takes two sequences of different lengths in a long and a short piece, and goes on until a block leaves the window: encoding, the choice of exact
tokens, attention of one and of few queries with units of padding to skip, a token's place in the window. Then keys and values are decoded, and a step
writes and reads pages. There is no model around it: racecheck doesn't survive cuBLAS.
"""

import sys

import torch
from attention import Shape, made_up_sides
from paged import DTYPE, Pages
from torch import Tensor

from spectralquant.attention.cuda import FusedAttention
from spectralquant.cache.segment import Segment
from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.config import CacheConfig, Dials
from spectralquant.paged.layer import Scoring
from spectralquant.presets import PRESETS
from spectralquant.profile import Choices, LayerProfile, Profile
from spectralquant.rope import Rotary

DEVICE = torch.device("cuda", 0)
BATCH, HEADS, GROUPS, PADDING = 2, 2, 2, 200
LONG, SHORT, NEW = 488, 20, 8  # the window then has room for four of the new tokens


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


@torch.no_grad()
def run(dim: int) -> None:
    """Once with heads of size `dim`."""
    key, value = made_up_sides(HEADS, dim)
    layer = LayerProfile(key, value, torch.full((HEADS,), float(dim)), 10.0, Rotary(1e4 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))))
    codec = build_codec(Profile({0: layer}, Choices(), {}, {}), PRESETS["high"], Dials(), DEVICE, "joint")[0]
    kernel, start = FusedAttention(DEVICE), torch.tensor([0, PADDING], device=DEVICE)
    keys, values = (random(BATCH, HEADS, LONG, dim) for _ in range(2))
    segment = Segment(codec, CacheConfig(backend="cuda"), keys, start)
    segment.update(keys, values)
    view = segment.update(random(BATCH, HEADS, SHORT, dim), random(BATCH, HEADS, SHORT, dim))
    assert view is not None
    outs = [kernel.attend(random(BATCH, HEADS * GROUPS, SHORT, dim), view)]
    for _ in range(NEW):
        segment.pack_ready()
        view = segment.append(random(BATCH, HEADS, 1, dim), random(BATCH, HEADS, 1, dim))
        segment.count_step()
        outs.append(kernel.attend(random(BATCH, HEADS * GROUPS, 1, dim), view))
    dense = [view.dense(which)[:, :, : segment.length] for which in ("key", "value")]
    if not all(bool(x.isfinite().all()) for x in (*outs, *dense, attend_pages(codec, dim))):
        sys.exit(f"D = {dim}: not finite")
    print(f"D = {dim}: {segment.length} tokens, {segment.packed} of them packed")


def attend_pages(codec: LayerCodec, dim: int) -> Tensor:
    """A step of single tokens, written to random pages and attended, one of which has lost its exact copy."""
    pages = Pages(codec, Shape(BATCH, 512, dim, GROUPS, heads=HEADS), 1, DEVICE)
    step, query, key, value = pages.step(0), *(pages.vectors(heads) for heads in (HEADS * GROUPS, HEADS, HEADS))
    pages.layer.layout.serials(pages.pages)[step.read_pages[0, 0]] = 0
    pages.layer.store(pages.pages, key, value, step)
    out = torch.full_like(query, torch.nan, dtype=DTYPE)
    pages.layer.attend(query, key, value, pages.pages, step, Scoring(), out)
    return out


if __name__ == "__main__":
    for size in sys.argv[1:] or ["64"]:
        run(int(size))
