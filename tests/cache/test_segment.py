"""One layer's storage."""

import pytest
import synthetic
import torch

from spectralquant.backend import BackendChoice
from spectralquant.cache.exact import EARLY
from spectralquant.cache.segment import Segment
from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.codec.layout import UNIT
from spectralquant.config import CacheConfig, Dials
from spectralquant.engine import SpectralQuantEngine
from spectralquant.errors import BackendError, ShapeError
from spectralquant.presets import PRESETS

CONFIG = CacheConfig(window=32, tile_tokens=256)


@pytest.fixture(params=[False, True], ids=["at once", "later"], autouse=True)
def later(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether exact tokens are stored by the next operation, as on a GPU."""
    monkeypatch.setattr("spectralquant.cache.segment.waits_later", lambda device: request.param)
    return request.param


@pytest.fixture
def codec(engine: SpectralQuantEngine) -> LayerCodec:
    return next(iter(engine.profile_codec().values()))


def random_kv(codec: LayerCodec, length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    heads, dim = codec.key.encode_matrix.shape[:2]
    return torch.randn(batch, heads, length, dim), torch.randn(batch, heads, length, dim)


def segment_of(codec: LayerCodec, keys: torch.Tensor) -> Segment:
    return Segment(codec, CONFIG, keys, torch.zeros(len(keys), dtype=torch.int64))


def content(segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    segment.finish()
    view = segment._view(segment.recent_keys[:, :, : segment.recent], segment.recent_values[:, :, : segment.recent], segment.lengths)
    return view.dense("key"), view.dense("value")


@pytest.mark.parametrize("pieces", [[700], [1] * 450, [300, 1, 1, 200, 17], [127, 1, 128, 129], [5, 600]])
def test_update_is_independent_of_pieces(codec: LayerCodec, poison: None, pieces: list[int]) -> None:
    """Any way of handing over the same tokens leaves the same codes once the same blocks are packed."""
    keys, values = random_kv(codec, sum(pieces))
    segment, first = segment_of(codec, keys), 0
    for count in pieces:
        segment.update(keys[:, :, first : first + count], values[:, :, first : first + count])
        first += count
    whole = segment_of(codec, keys)
    whole.update(keys, values)
    units = min(segment.packed, whole.packed) // UNIT
    assert segment.length == whole.length == sum(pieces)
    assert units > 0 and torch.equal(segment.records[:, :, :units], whole.records[:, :, :units])


def test_update_keeps_sinks_and_window_exact(codec: LayerCodec) -> None:
    keys, values = random_kv(codec, 600)
    segment = segment_of(codec, keys)
    segment.update(keys, values)
    got_keys, got_values = content(segment)
    for part in (slice(0, CONFIG.sinks), slice(600 - CONFIG.window, 600)):
        torch.testing.assert_close(got_keys[:, :, part], keys[:, :, part], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got_values[:, :, part], values[:, :, part], rtol=1e-3, atol=1e-3)


def test_finish_that_fails_can_be_repeated(codec: LayerCodec, later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, for instance: nothing is lost; and what is cropped away needs no room."""
    keys, values = random_kv(codec, 600)
    segment, want = segment_of(codec, keys), by_hand(codec, [(keys, values)])
    if not later:
        return
    segment.update(keys, values)
    with monkeypatch.context() as patched:
        patched.setattr(Segment, "reserve_exact", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            segment.finish()
        other = segment_of(codec, keys)
        other.update(keys[:, :, :300], values[:, :, :300])  # one tile
        other.crop(0)
        assert other.length == 0
    assert_same_content(segment, want)


def test_update_keeps_secondary_sinks_exact_within_the_bound(codec: LayerCodec) -> None:
    keys, values = random_kv(codec, 1200)
    values[:, :, 100:900:3] *= 1e-3
    segment = segment_of(codec, keys)
    segment.update(keys, values)
    segment.finish()
    used = (segment.exact_slots >= 0).sum(-1)
    assert (used > CONFIG.sinks).all()
    assert (used <= CONFIG.sinks + EARLY + min(codec.exact_bound, CONFIG.max_exact_share) * segment.packed).all()


def test_update_keeps_badly_coded_keys_exact(codec: LayerCodec) -> None:
    """Keys far off the calibrated spectrum, and no others, though nothing is odd about their values."""
    slots = torch.arange(512)
    clean = codec.decode_keys(
        torch.randint(0, 4, (1, codec.key.mean.shape[0], 512, codec.layout.key_planes), dtype=torch.uint8),
        torch.full((1, codec.key.mean.shape[0], 512), 120, dtype=torch.uint8), slots, torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    keys, values = clean.clone(), torch.randn_like(clean)
    odd = [150, 151, 250]
    keys[:, :, odd] *= 8
    segment = segment_of(codec, keys)
    segment.update(keys, values)
    segment.finish()
    found = segment.exact_slots[0].tolist()
    assert set(odd) <= set(found) and len([s for s in found if s >= CONFIG.sinks]) == len(odd)
    got, _ = content(segment)
    torch.testing.assert_close(got[:, :, odd], keys[:, :, odd], rtol=2e-3, atol=2e-3)


def test_update_rejects_other_heads(codec: LayerCodec) -> None:
    with pytest.raises(ShapeError, match="calibrate this model"):
        segment_of(codec, torch.randn(1, 7, 3, codec.head_dim))


@pytest.mark.parametrize("length", [700, 690, 500, 385, 384, 200, 3, 0])
def test_crop_then_continue(codec: LayerCodec, poison: None, length: int) -> None:
    """What is left after a crop is what was there, and the segment goes on as before."""
    keys, values = random_kv(codec, 700)
    segment = segment_of(codec, keys)
    segment.update(keys, values)
    before = content(segment)
    segment.crop(length)
    after = content(segment)
    assert segment.length == length
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old[:, :, :length], rtol=1e-3, atol=1e-3)
    more = random_kv(codec, 300)
    segment.update(*more)
    assert segment.length == length + 300 and content(segment)[0].isfinite().all()


def test_lengths_on_the_device_follow(codec: LayerCodec) -> None:
    """Kernels read lengths from a tensor: after every step it holds what the host knows, and a view its own."""
    keys, values = random_kv(codec, 600)
    segment, first = segment_of(codec, keys), 0
    for count in (200, 1, 90, 16, 150, 1, 142):
        view = segment.update(keys[:, :, first : first + count], values[:, :, first : first + count])
        first += count
        if view is not None:
            assert view.lengths.tolist() == [[view.packed // UNIT, view.raw_keys.shape[-2]]] * 2
        assert segment.lengths.tolist() == [[segment.packed // UNIT, segment.recent]] * 2
    for length in (590, 300, 131, 0):
        segment.crop(length)
        assert segment.lengths.tolist() == [[segment.packed // UNIT, segment.recent]] * 2


def test_padding_on_the_host_follows_the_batch(codec: LayerCodec) -> None:
    keys, values = random_kv(codec, 300)
    segment = Segment(codec, CONFIG, keys, torch.tensor([0, 7]))
    segment.update(keys, values)
    assert segment.padding == (0, 7)
    segment.map_rows(lambda t: t[[1, 0, 1]])
    assert segment.padding == (7, 0, 7) and segment.lengths.shape == (3, 2)


def test_backend_is_chosen_once(codec: LayerCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = random_kv(codec, 1)[0]
    start = torch.zeros(2, dtype=torch.int64)
    assert not Segment(codec, CacheConfig(), keys, start).kernels
    with pytest.raises(BackendError, match="not on an NVIDIA GPU"):
        Segment(codec, CacheConfig(backend="cuda"), keys, start)
    monkeypatch.setattr("spectralquant.cache.segment.resolve_backend", lambda *_: BackendChoice("cuda", "of this test"))
    tables = build_codec(synthetic.profile(layers=(0,)), PRESETS["high"], Dials(), quantizer="lloyd-max")[0]
    keys = torch.zeros(2, 2, 1, 64)
    assert Segment(codec, CacheConfig(), random_kv(codec, 1)[0], start).kernels
    assert not Segment(tables, CacheConfig(), keys, start).kernels
    with pytest.raises(BackendError, match="lloyd-max"):
        Segment(tables, CacheConfig(backend="cuda"), keys, start)


def test_copy_is_independent(codec: LayerCodec) -> None:
    keys, values = random_kv(codec, 400)
    segment = segment_of(codec, keys)
    segment.update(keys, values)
    before, other = content(segment), segment.copy()
    other.update(*random_kv(codec, 300))
    assert segment.length == 400 and all(torch.equal(a, b) for a, b in zip(before, content(segment), strict=True))


def rows_of(segment: Segment, rows: list[int]) -> Segment:
    """A segment with these rows of `segment`, which shares its packed units."""
    other = segment.copy()
    other.map_rows(lambda t: t[rows])
    return other


def by_hand(codec: LayerCodec, pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Content of a segment that got `pieces` one after another and never shared anything."""
    segment = segment_of(codec, pieces[0][0])
    for piece in pieces:
        segment.update(*piece)
    return content(segment)


def assert_same_content(segment: Segment, want: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(content(segment), want, strict=True))


def test_rows_and_copies_read_one_prefix(codec: LayerCodec, poison: None) -> None:
    """Each goes on by itself, as if it had all to itself; what was packed before is held once and stays what it was."""
    text, more, others = random_kv(codec, 700), random_kv(codec, 300, batch=3), random_kv(codec, 400)
    segment = segment_of(codec, text[0])
    segment.update(*text)
    where, bits = segment.records.data_ptr(), segment.records[:, :, : segment.packed // UNIT].clone()
    rows = rows_of(segment, [1, 1, 0])
    assert rows.prefix is not None and rows.prefix.records.data_ptr() == segment.prefix.records.data_ptr() == where and rows.records.shape[2] == 0
    rows.update(*more)
    segment.update(*others)
    again = rows_of(rows, [2, 0])
    again.update(*others)
    repeated = tuple(x[[1, 1, 0]] for x in text)
    assert_same_content(segment, by_hand(codec, [text, others]))
    assert_same_content(rows, by_hand(codec, [repeated, more]))
    assert_same_content(again, by_hand(codec, [tuple(x[[2, 0]] for x in repeated), tuple(x[[2, 0]] for x in more), others]))
    assert again.prefix.records.data_ptr() == where and torch.equal(again.prefix.records[:, :, : bits.shape[2]], bits)


@pytest.mark.parametrize("length", [800, 500, 300, 100, 0])
def test_crop_into_a_prefix(codec: LayerCodec, poison: None, length: int) -> None:
    text, more = random_kv(codec, 600), random_kv(codec, 300)
    segment = segment_of(codec, text[0])
    segment.update(*text)
    other = segment.copy()
    other.update(*more)
    before, whole = content(segment), content(other)
    other.crop(length)
    for new, old in zip(content(other), whole, strict=True):
        torch.testing.assert_close(new, old[:, :, :length], rtol=1e-3, atol=1e-3)
    other.update(*more)
    assert other.length == length + 300 and content(other)[0].isfinite().all()
    assert_same_content(segment, before)


def test_rows_that_none_begins_with_are_dropped(codec: LayerCodec) -> None:
    text = random_kv(codec, 700, batch=4)
    segment = segment_of(codec, text[0])
    segment.update(*text)
    rows = rows_of(segment, [3, 1, 3])
    want = content(rows)
    rows.drop_unused()
    assert rows.prefix is not None and rows.prefix.records.shape[0] == 2 and segment.prefix.records.shape[0] == 4
    assert_same_content(rows, want)


def test_stores_behind_a_prefix_don_t_grow_beyond_what_is_expected(codec: LayerCodec) -> None:
    text, more = random_kv(codec, 12 * UNIT), random_kv(codec, 10 * UNIT)
    segment = segment_of(codec, text[0])
    segment.update(*text)
    other = segment.copy()
    other.expected = 24 * UNIT
    for first in range(0, 10 * UNIT, 16):
        other.update(*(x[:, :, first : first + 16] for x in more))
        assert other.prefix.units + other.records.shape[2] <= 24


def test_records_grow_amortised(codec: LayerCodec) -> None:
    """Storage changes O(log n) times and slack stays within an eighth."""
    keys, values = random_kv(codec, 1, batch=1)
    segment, moves, last = segment_of(codec, keys), 0, 0
    for _ in range(40 * UNIT):
        segment.update(keys, values)
        moves += segment.records.data_ptr() != last
        last = segment.records.data_ptr()
    units = segment.packed // UNIT
    assert units <= segment.records.shape[2] <= units + units // 8 + 1
    assert moves < units


def test_an_encoded_block_counts_when_it_is_stored(codec: LayerCodec) -> None:
    """Until then the content is what it was; afterwards it is what packing gives that encodes when the block is due."""
    keys, values = random_kv(codec, 2 * UNIT + 3 * CONFIG.window)
    values[:, :, 140:200:7] *= 1e-3
    early, late = segment_of(codec, keys), segment_of(codec, keys)
    for segment in (early, late):
        for i in range(keys.shape[2]):
            token = (keys[:, :, i : i + 1], values[:, :, i : i + 1])
            if segment is early and segment.can_encode:
                before, lengths = content(segment), segment.lengths.tolist()
                segment.reserve_unit()
                segment.encode_block()
                segment.encoded, need = True, int(segment.exact_need())
                assert all(torch.equal(a, b) for a, b in zip(before, content(segment), strict=True)) and segment.lengths.tolist() == lengths
            packed = segment.packed
            segment.update(*token)
            if segment is early and segment.packed > packed:
                assert need == (segment.exact_slots >= 0).sum(-1).max() and not segment.encoded  # all sinks are real tokens
    assert early.packed == late.packed == 2 * UNIT
    for name in ("exact_slots", "exact_keys", "lengths", "secondary"):
        assert torch.equal(getattr(early, name), getattr(late, name))
    assert torch.equal(early.records[:, :, :2], late.records[:, :, :2])
