"""Every byte of packed records comes back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralquant.archive.lossless import pack_records, unpack_records
from spectralquant.codec.layout import UNIT, RecordLayout, pack_planes
from spectralquant.errors import CacheFileError, ShapeError

LAYOUT = RecordLayout(16, 32)


def records(batch: int, heads: int, units: int, seed: int = 0) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, heads, units, LAYOUT.record_bytes), generator=make, dtype=torch.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(0, 3), st.integers(0, 99))
def test_any_bytes_come_back(batch: int, heads: int, units: int, seed: int) -> None:
    given_ = records(batch, heads, units, seed)
    payload = pack_records(LAYOUT, given_)
    assert torch.equal(unpack_records(LAYOUT, payload, (batch, heads, units)), given_)
    assert torch.equal(payload, pack_records(LAYOUT, given_))


def test_planes_that_are_not_uniform_take_their_entropy() -> None:
    share = torch.tensor([0.1, 0.4, 0.4, 0.1])
    symbols = torch.multinomial(share, 64 * UNIT * 48, replacement=True, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    key, value = symbols.view(1, 1, 64, UNIT, 48).split([16, 32], -1)
    gains = torch.full((1, 1, 64, UNIT), 130, dtype=torch.uint8)
    made = torch.cat([pack_planes(key.contiguous(), "key"), gains, pack_planes(value.contiguous(), "value"), gains], -1)
    bits = 8 * len(pack_records(LAYOUT, made)) / symbols.numel()
    assert -(share * share.log2()).sum() < bits < 1.02 * -(share * share.log2()).sum()


def test_records_of_another_layout_are_refused() -> None:
    with pytest.raises(ShapeError, match="expected uint8"):
        pack_records(RecordLayout(32, 32), records(1, 1, 1))
    with pytest.raises(ShapeError, match=r"torch.int32"):
        pack_records(LAYOUT, records(1, 1, 1).int())


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 2, 1), (2, 2, 2), (1, 1, 2), (1, 2, 0)])
def test_a_payload_of_another_shape_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(CacheFileError, match="expected"):
        unpack_records(LAYOUT, pack_records(LAYOUT, records(1, 2, 2)), shape)


def test_a_payload_that_is_no_bytes_is_refused() -> None:
    with pytest.raises(CacheFileError, match=r"torch.float32"):
        unpack_records(LAYOUT, torch.zeros(5), (1, 1, 1))
    with pytest.raises(CacheFileError, match="0 bytes"):
        unpack_records(LAYOUT, torch.zeros(0, dtype=torch.uint8), (1, 1, 1))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_payload_is_an_error_or_other_records(data: st.DataObject) -> None:
    payload = pack_records(LAYOUT, records(1, 1, 1))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = unpack_records(LAYOUT, payload[: data.draw(st.integers(len(payload) - 2, len(payload)))], (1, 1, 1))
    except CacheFileError:
        return
    assert found.shape == (1, 1, 1, LAYOUT.record_bytes)
