"""A paged layer against the contiguous one."""

import pytest
import torch
from cache import PagedCache, Sequence, codec_of, sequence_of, typical_sequence

from spectralquant.attention.dispatch import attend_packed
from spectralquant.cache.segment import Segment
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import UNIT
from spectralquant.codec.packed import PackedKV
from spectralquant.config import CacheConfig
from spectralquant.paged.layer import Scoring
from spectralquant.paged.layout import from_8_bits, to_8_bits


def contiguous(codec: LayerCodec, sequence: Sequence) -> Segment:
    return Segment(codec, CacheConfig(sinks=1, window=128, max_exact_share=0.25), sequence.keys[None], torch.zeros(1, dtype=torch.int64))


def round_exact(kv: PackedKV) -> PackedKV:
    """Exact tokens of the contiguous store as pages have them, in 8 bits."""
    for part in (kv.exact_keys, kv.exact_values):
        part.copy_(from_8_bits(*to_8_bits(part), part.dtype))
    return kv


def compare(cache: PagedCache, work: list[tuple[Sequence, int]], segments: list[Segment], **scoring: object) -> None:
    """One step of both."""
    before = [s.length for s, _ in work]
    for (sequence, count), first, segment, (query, got) in zip(work, before, segments, cache.step(work), strict=True):
        keys, values = (x[None, :, first : first + count] for x in (sequence.keys, sequence.values))
        kv = segment.update(keys, values)
        if kv is None:
            assert not scoring
            want = torch.nn.functional.scaled_dot_product_attention(query[None], keys, values, is_causal=count > 1, enable_gqa=True)
        else:
            segment.finish()
            want = attend_packed(query[None], round_exact(kv), **scoring)
        # Several new tokens are read as they came here, and in 16 bits there where the window has room; a single one is the other way round at first.
        torch.testing.assert_close(got[None], want, atol=2e-3 if kv is None else 1e-3 if count > 1 else 2e-5, rtol=1e-3)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("lengths", [[1, 127, 300, 700], [255, 256, 257, 128]])
def test_decoding_reads_what_the_contiguous_cache_reads(lengths: list[int], anchored: bool) -> None:
    """Prompts in one piece, then tokens one by one, all sequences at once."""
    codec, steps = codec_of(anchored=anchored), 150
    sequences = [sequence_of(codec, n + steps, seed=n, small=(n // 2, n // 2 + 7)) for n in lengths]
    cache, segments = PagedCache(codec), [contiguous(codec, s) for s in sequences]
    for counts in [lengths] + [[1] * len(lengths)] * steps:
        compare(cache, list(zip(sequences, counts, strict=True)), segments)


@pytest.mark.parametrize("pieces", [[300, 200, 17, 130], [5, 600, 1, 1, 40], [128, 128, 128, 128], [1, 2, 3, 250, 500]])
def test_prompts_in_pieces_read_what_the_contiguous_cache_reads(pieces: list[int]) -> None:
    codec = codec_of()
    sequence = sequence_of(codec, sum(pieces), seed=3, small=(40, 200, 333))
    cache, segment = PagedCache(codec), contiguous(codec, sequence)
    for count in pieces:
        compare(cache, [(sequence, count)], [segment])


def test_prompts_and_single_tokens_in_one_step() -> None:
    codec = codec_of()
    a, b, c = (sequence_of(codec, 900, seed=i, small=(30,)) for i in range(3))
    cache, segments = PagedCache(codec), [contiguous(codec, s) for s in (a, b, c)]
    for counts in ([400, 20, 300], [1, 500, 1], [1, 1, 200], [17, 1, 1]):
        compare(cache, list(zip((a, b, c), counts, strict=True)), segments)


def test_scoring() -> None:
    codec = codec_of()
    scoring = {"scale": 0.3, "softcap": 5.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    sequence = sequence_of(codec, 500, seed=1)
    cache, segment = PagedCache(codec, scoring=Scoring(**scoring)), contiguous(codec, sequence)
    cache.step([(sequence, 400)])
    segment.update(sequence.keys[None, :, :400], sequence.values[None, :, :400])
    for count in (1, 60, 1):
        compare(cache, [(sequence, count)], [segment], **scoring)


def test_a_shared_prefix_reads_as_an_own_one() -> None:
    """A request that begins with pages of another one, full ones, goes on as if it had written them."""
    codec = codec_of()
    first = sequence_of(codec, 700, seed=1, small=(50, 300))
    cache = PagedCache(codec)
    cache.step([(first, 384)])
    own = Sequence(first.keys, first.values)
    alone = PagedCache(codec)
    alone.step([(own, 384)])
    second = Sequence(first.keys, first.values, pages=first.pages[:3], length=384)
    for count in (100, 1, 1, 130):
        (_, got), (_, want) = cache.step([(second, count)])[0], alone.step([(own, count)])[0]
        assert torch.equal(got, want)


def test_a_page_without_its_exact_copy_is_read_by_its_codes() -> None:
    """Somebody moved the pages: to others that have exact copies of what was there before."""
    codec = codec_of(exact_below=0.0)
    sequence, other = sequence_of(codec, 500, seed=1), sequence_of(codec, 500, seed=2)
    cache = PagedCache(codec)
    cache.step([(sequence, 384), (other, 384)])
    cache.pages[other.pages] = cache.pages[sequence.pages]
    other.keys, other.values = sequence.keys, sequence.values
    query, got = cache.step([(other, 1)])[0]
    segment = contiguous(codec, sequence)
    segment.config = CacheConfig(sinks=1, window=1, max_exact_share=0.25)
    segment.update(sequence.keys[None, :, :385], sequence.values[None, :, :385])  # all but one token are packed
    kv = segment._view(segment.recent_keys[:, :, :1], segment.recent_values[:, :, :1], segment.lengths)
    assert kv.packed == 384
    torch.testing.assert_close(got[None], attend_packed(query[None], round_exact(kv)), atol=2e-5, rtol=1e-4)
    assert (got - cache.step([(sequence, 1)])[0][1]).abs().max() > 1e-3, "exact copies make no difference, so nothing was shown"


@pytest.mark.parametrize("copies", [1, 3, 5])
def test_few_exact_copies_cost_accuracy_only(copies: int) -> None:
    codec, count = codec_of(anchored=False), 6
    few, many = PagedCache(codec, copies=copies), PagedCache(codec, copies=3 * count)
    make = lambda: [typical_sequence(600, seed=i) for i in range(count)]  # noqa: E731
    ours, theirs, off = make(), make(), []
    for n in [200] + [1] * 120 + [77]:
        for (_, got), (_, want) in zip(few.step([(s, n) for s in ours]), many.step([(s, n) for s in theirs]), strict=True):
            assert got.isfinite().all()
            off.append(float((got - want).norm() / want.norm()))
    assert 0.001 < sum(off) / len(off) < 0.3


def test_what_was_rejected_leaves_nothing_behind() -> None:
    """Drafts are written and taken back: pages hold what they would without them."""
    codec = codec_of()
    sequence, drafts = sequence_of(codec, 500, seed=1, small=(130, 260)), sequence_of(codec, 500, seed=2, small=(132, 133, 255, 258))
    a, b = PagedCache(codec), PagedCache(codec)
    plain = Sequence(sequence.keys, sequence.values)
    a.step([(sequence, 131)]), b.step([(plain, 131)])
    for count in (5, 120, 3, 7):
        kept = sequence.keys, sequence.values
        sequence.keys, sequence.values = drafts.keys, drafts.values
        a.step([(sequence, 8)])
        sequence.length -= 8
        sequence.keys, sequence.values = kept
        (_, got), (_, want) = a.step([(sequence, count)])[0], b.step([(plain, count)])[0]
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    codec = codec_of()
    sequence = sequence_of(codec, 500, seed=1, small=(100, 200))
    sequence.keys, sequence.values = sequence.keys.to(dtype), sequence.values.to(dtype)
    cache, segment = PagedCache(codec, dtype=dtype), contiguous(codec, sequence)
    for count in (300, 1, 1, 150):
        before = sequence.length
        (query, got), new = cache.step([(sequence, count)])[0], slice(before, before + count)
        kv = segment.update(sequence.keys[None, :, new], sequence.values[None, :, new])
        if kv is not None:
            segment.finish()
            torch.testing.assert_close(got[None], attend_packed(query[None], round_exact(kv)), atol=1e-2, rtol=2e-2)


def test_padding_is_written_nowhere() -> None:
    codec = codec_of()
    sequence = sequence_of(codec, 300, seed=1)
    a, b = PagedCache(codec), PagedCache(codec)
    plain = Sequence(sequence.keys, sequence.values)
    a.step([(sequence, 200)], padding=0), b.step([(plain, 200)], padding=50)
    own = b.layer.layout.serials(b.pages)
    own.copy_(a.layer.layout.serials(a.pages))  # drawn at random
    assert torch.equal(a.pages[1:], b.pages[1:])
    assert not torch.equal(a.pages[a.free], a.pages[sequence.pages][:1]) and UNIT * len(sequence.pages) >= 200


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("pieces", [[300, 200, 17, 130], [1500, 900, 700], [128, 200, 1, 40]])
def test_prompts_in_pieces_on_a_gpu(pieces: list[int], dim: int) -> None:
    """By the kernels that contiguous stores have, on copies of the codes, against PyTorch on the same device."""
    codec = codec_of(dim=dim, device="cuda")
    sequence = sequence_of(codec, sum(pieces), seed=3, small=(40, 200, 333), dtype=torch.float16)
    plain = Sequence(sequence.keys, sequence.values)
    ours, reference = (PagedCache(codec, dtype=torch.float16, backend=backend) for backend in ("cuda", "reference"))
    for count in pieces:
        (_, got), (_, want) = ours.step([(sequence, count)], groups=8)[0], reference.step([(plain, count)], groups=8)[0]
        assert (got - want).norm() < 0.02 * want.norm()
