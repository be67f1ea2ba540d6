"""Every bit is where the docstring says."""

import oracles
import pytest
import torch

from spectralquant.codec import layout
from spectralquant.errors import ShapeError

SIDES = pytest.mark.parametrize("which", ["key", "value"])


def random_planes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 4, shape, dtype=torch.uint8)


@SIDES
@pytest.mark.parametrize("planes", [16, 48])
def test_pack_planes_puts_every_bit_where_the_docstring_says(which: str, planes: int) -> None:
    x = random_planes(layout.UNIT, planes)
    assert bytes(layout.pack_planes(x, which).tolist()) == oracles.packed_words(x, which)


@SIDES
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3)])
@pytest.mark.parametrize("planes", [16, 80, 208])
def test_unpack_planes_inverts_pack_planes(which: str, shape: tuple[int, ...], planes: int) -> None:
    x = random_planes(*shape, layout.UNIT, planes)
    packed = layout.pack_planes(x, which)
    assert packed.shape == (*shape, planes // layout.CHUNK_PLANES * layout.CHUNK_BYTES)
    assert torch.equal(layout.unpack_planes(packed, which), x)


@SIDES
def test_pack_planes_inverts_unpack_planes_on_any_bytes(which: str) -> None:
    """No bit of a packed unit is unused."""
    packed = torch.randint(0, 256, (2, 3 * layout.CHUNK_BYTES), dtype=torch.uint8)
    assert torch.equal(layout.pack_planes(layout.unpack_planes(packed, which), which), packed)


@SIDES
def test_unpack_planes_reads_views_of_records(which: str) -> None:
    """A record's codes start at an offset and are strided: nothing may assume contiguous input."""
    record = layout.RecordLayout(32, 48)
    records = torch.randint(0, 256, (2, 3, record.record_bytes), dtype=torch.uint8)
    key, _, value, _ = record.split(records)
    view = key if which == "key" else value
    assert torch.equal(layout.unpack_planes(view, which), layout.unpack_planes(view.contiguous(), which))


@SIDES
def test_unpack_pairs_orders_tokens_by_group(which: str) -> None:
    x = random_planes(2, layout.UNIT, 32)
    pairs = layout.unpack_pairs(layout.pack_planes(x, which), which)
    for pair in range(layout.PAIRS):
        for group in range(layout.GROUPS):
            assert torch.equal(pairs[pair, :, group], x[:, 64 * (group // 16) + 16 * pair + group % 16])


def test_pack_gains_puts_every_byte_where_the_docstring_says() -> None:
    codes = torch.randperm(layout.UNIT).to(torch.uint8)
    assert bytes(layout.pack_gains(codes).tolist()) == oracles.packed_gains(codes)


def test_unpack_gains_inverts_pack_gains() -> None:
    codes = torch.randint(0, 256, (3, 2, layout.UNIT), dtype=torch.uint8)
    assert torch.equal(layout.unpack_gains(layout.pack_gains(codes)), codes)


def test_gain_codes_inverts_gain_values() -> None:
    codes = torch.arange(1, 256, dtype=torch.uint8)
    assert torch.equal(layout.gain_codes(layout.gain_values(codes)), codes)


def test_gain_codes_is_within_half_a_step() -> None:
    gains = torch.exp2(torch.linspace(-15.8, 15.8, 4001))
    ratio = (layout.gain_values(layout.gain_codes(gains)) / gains).log2()
    assert ratio.abs().max() <= 1 / 16 + 1e-5


def test_gain_codes_never_masks() -> None:
    """Code 0 is reserved: however small a gain is, its token still counts."""
    assert torch.equal(layout.gain_codes(torch.tensor([0.0, 1e-38, 1e-9, 1e30])), torch.tensor([1, 1, 1, 255], dtype=torch.uint8))


def test_gain_values_of_a_masked_slot_is_zero() -> None:
    gains = layout.gain_values(torch.arange(256, dtype=torch.uint8))
    assert gains[layout.MASKED_GAIN] == 0 and (gains[1:] > 0).all() and (gains[1:].diff() > 0).all()


@pytest.mark.parametrize(("key", "value"), [(16, 16), (80, 112), (256, 16)])
def test_split_covers_a_record_without_overlap(key: int, value: int) -> None:
    record = layout.RecordLayout(key, value)
    x = torch.arange(record.record_bytes)
    parts = record.split(x)
    assert torch.equal(torch.cat(parts), x)
    assert [len(p) * 8 / layout.UNIT for p in parts] == [2 * key, 8, 2 * value, 8]
    assert record.bytes_per_token * 8 == 2 * (key + value) + 16


def test_split_gives_views() -> None:
    record = layout.RecordLayout(16, 16)
    records = torch.zeros(2, record.record_bytes, dtype=torch.uint8)
    for part in record.split(records):
        part.fill_(7)
    assert (records == 7).all()


@pytest.mark.parametrize(
    ("key", "value", "name"), [(0, 16, "key_planes=0"), (16, -16, "value_planes=-16"), (24, 16, "key_planes=24"), (16, 17, "value_planes=17")]
)
def test_record_layout_rejects_partial_chunks(key: int, value: int, name: str) -> None:
    with pytest.raises(ShapeError, match=name):
        layout.RecordLayout(key, value)
