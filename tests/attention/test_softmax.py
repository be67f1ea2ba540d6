"""Softmax across tiles against softmax at once."""

import pytest
import torch

from spectralquant.attention.softmax import RunningSoftmax


@pytest.mark.parametrize("overwrite", [False, True])
def test_tiles_give_what_one_softmax_gives(overwrite: bool) -> None:
    scores, values = 20 * torch.randn(2, 3, 5, 40), torch.randn(2, 3, 40, 7)
    scores[:, :, 1, :16], scores[:, :, 2, 30:] = -torch.inf, -torch.inf  # hidden in the first tiles, and in the last one
    want = scores.double().softmax(-1) @ values.double()
    state = RunningSoftmax.empty(scores.shape[:-1], 7, scores.device)
    for first in range(0, 40, 8):
        tile = scores[..., first : first + 8].clone()
        kept = tile.clone()
        weights = state.add(tile, overwrite)
        assert (weights is tile or weights.data_ptr() == tile.data_ptr()) if overwrite else torch.equal(tile, kept)
        state.total += weights @ values[:, :, first : first + 8]
    assert (state.result() - want).abs().max() < 1e-5


def test_a_row_that_sees_nothing_is_zero() -> None:
    state = RunningSoftmax.empty(torch.Size((1, 1, 2)), 3, torch.device("cpu"))
    scores = torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]])[None, None]
    state.total += state.add(scores) @ torch.ones(1, 1, 2, 3)
    assert torch.equal(state.result()[0, 0], torch.tensor([[1.0] * 3, [0.0] * 3]))


def test_scores_that_are_a_view_of_a_parameter_stay() -> None:
    sinks = torch.nn.Parameter(torch.randn(3))
    before = sinks.detach().clone()
    with torch.no_grad():
        RunningSoftmax.empty(torch.Size((2, 3, 4)), 1, sinks.device).add(sinks.view(1, 3, 1, 1).expand(2, 3, 4, 1))
    assert torch.equal(sinks.detach(), before)
