"""A paged layer against the contiguous one."""

import pytest
import torch
from cache import PagedCache, Sequence, codec_of, sequence_of

from spectralquant.attention.dispatch import attend_packed
from spectralquant.cache.segment import Segment
from spectralquant.codec.codec import LayerCodec
from spectralquant.config import CacheConfig


def contiguous(codec: LayerCodec, sequence: Sequence) -> Segment:
    return Segment(codec, CacheConfig(sinks=1, window=128, max_exact_share=0.25), sequence.keys[None], torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("lengths", [[1, 127, 300, 700], [255, 256, 257, 128]])
def test_decoding_reads_what_the_contiguous_cache_reads(lengths: list[int], anchored: bool) -> None:
    """Prompts in one piece, then tokens one by one, all sequences at once."""
    codec, steps = codec_of(anchored=anchored), 150
    work = [sequence_of(codec, n + steps, seed=n, small=(n // 2, n // 2 + 7)) for n in lengths]
    cache, segments = PagedCache(codec), [contiguous(codec, s) for s in work]
    counts = lengths
    for _ in range(steps):
        before = [s.length for s in work]
        for i, (query, got) in enumerate(cache.step(list(zip(work, counts, strict=True)))):
            new = slice(before[i], before[i] + counts[i])
            keys, values = work[i].keys[None, :, new], work[i].values[None, :, new]
            kv = segments[i].update(keys, values)
            if kv is None:
                want = torch.nn.functional.scaled_dot_product_attention(query[None], keys, values, is_causal=True, enable_gqa=True)
            else:
                segments[i].finish()
                want = attend_packed(query[None], kv)
            torch.testing.assert_close(got[None], want, atol=2e-3 if kv is None else 2e-5, rtol=1e-4)
        counts = [1] * len(lengths)
