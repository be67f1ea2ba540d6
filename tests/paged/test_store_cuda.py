"""Tokens written to pages by the kernels, against `write_tokens`: on the host, where every thread is a fiber, and with a GPU on the device."""

import shutil
from typing import Any

import pytest
import torch
from cache import PagedCache, codec_of, sequence_of
from host_attention import launch_on_host
from tolerances import CODE_FLIPS

from spectralquant.codec.encode_cuda import FusedEncoder
from spectralquant.codec.layout import unpack_planes
from spectralquant.kernels.launch import Launch
from spectralquant.paged.layout import token_bytes
from spectralquant.paged.store_cuda import TokenWriter

MACHINES = [
    pytest.param("cpu", id="host", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")),
    pytest.param("cuda", id="device", marks=pytest.mark.gpu),
]
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, head size 128": {"dim": 128, "heads": 1, "dtype": torch.bfloat16},
    "float16, joint, head size 80": {"dim": 80, "dtype": torch.float16, "quantizer": "joint"},
    "joint, plain frame": {"quantizer": "joint", "anchored": False, "dtype": torch.bfloat16},
    "constant mean": {"trajectory": False, "dtype": torch.float16},
    "by key error": {"exact_error": 1.2, "dtype": torch.float16},
}


class HostEncoder(FusedEncoder):
    """On the host."""

    def run(self, launch: Launch) -> None:
        launch_on_host(launch)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_writing(options: dict[str, Any], machine: str) -> None:
    """Pieces of sequences one after another, over the ends of pages, then single tokens; a rejected draft; tokens that belong to nobody."""
    dtype, options = options.get("dtype", torch.float32), {k: v for k, v in options.items() if k != "dtype"}
    codec = codec_of(device=machine, **options)
    made = []
    for kernels in (False, True):
        cache = PagedCache(codec, dtype=dtype, backend="reference")
        if kernels:
            cache.layer.writer = TokenWriter((HostEncoder if machine == "cpu" else FusedEncoder)(torch.device(machine)))
        work = [sequence_of(codec, 330, n, (0, 5, 130, 150, 260), dtype) for n in (1, 2, 3)]
        for counts in ([5, 100, 127], [1, 1, 1], [140, 30, 3], [1, 1, 0], [-20, 0, 0], [7, 1, 1]):
            if min(counts) < 0:
                for sequence, count in zip(work, counts, strict=True):
                    sequence.length += count
                continue
            step, keys, values = cache.plan(list(zip(work, counts, strict=True)), padding=2)
            cache.layer.store(cache.pages, keys, values, step)
            for sequence, count in zip(work, counts, strict=True):
                sequence.length += count
        made.append((cache, work))
    (want, work), (got, others) = made
    assert [s.pages for s in work] == [s.pages for s in others]
    for sequence in work:
        check_pages(want, got, sequence.pages, sequence.length)
    assert torch.equal(want.layer.recent_keys[:-128], got.layer.recent_keys[:-128]) and torch.equal(
        want.layer.recent_values[:-128], got.layer.recent_values[:-128]
    )


def check_pages(want: PagedCache, got: PagedCache, pages: list[int], length: int) -> None:
    """All but the codes has the same bits; these may be their neighbours where a sum was rounded the other way."""
    layout, (x, y) = want.layer.layout, (cache.pages[pages] for cache in (want, got))
    assert torch.equal(layout.places(x), layout.places(y))
    there = (layout.places(x) >= 0)[:, None, None].expand_as(layout.exponents(x))
    assert there.any()
    assert torch.equal(layout.exponents(x)[there], layout.exponents(y)[there]) and torch.equal(layout.integers(x)[there], layout.integers(y)[there])
    assert torch.equal(layout.serials(x) > 0, layout.serials(y) > 0)
    gains = token_bytes(layout.record, x.device).gains
    (a, b) = (layout.records(own)[..., gains] for own in (x, y))  # [pages, H, 128, 2]
    assert torch.equal(a == 0, b == 0) and float((a != b).float().mean()) < CODE_FLIPS
    for which, part in (("key", 0), ("value", 2)):
        a, b = (unpack_planes(layout.record.split(layout.records(own))[part], which).transpose(0, 1).flatten(1, 2)[:, :length] for own in (x, y))
        assert float((a != b).float().mean()) < CODE_FLIPS
