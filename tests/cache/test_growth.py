import pytest
import torch

from spectralquant.cache.growth import grown, grown_units


@pytest.mark.parametrize(
    ("have", "need", "ahead", "expected", "room"),
    [(0, 1, 0, None, 1), (160, 161, 0, None, 180), (160, 161, 8, None, 180), (16, 17, 8, None, 25), (160, 161, 0, 165 * 128 + 5, 165), (160, 161, 0, 300, 161)],
)
def test_stores_grow_by_an_eighth_and_not_beyond_what_is_expected(have: int, need: int, ahead: int, expected: int | None, room: int) -> None:
    assert grown_units(have, need, ahead, expected) == room


def test_grown_tensors_keep_their_content() -> None:
    tensor = torch.arange(6).reshape(2, 3)
    assert torch.equal(grown(tensor, 1, 5)[:, :3], tensor)
    assert grown(tensor, 1, 5, fill=-1).tolist() == [[0, 1, 2, -1, -1], [3, 4, 5, -1, -1]]
    assert grown(tensor[:, :0], 1, 2, fill=7).tolist() == [[7, 7], [7, 7]]
