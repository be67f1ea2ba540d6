"""Batches: every row of a padded batch is what it is alone."""

import pytest
import torch
from near_lossless import NEAR, Pair, relative, tokens


def padded(rows: list[torch.Tensor], left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [1, T] of several lengths as ids and mask [B, T]."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - row.shape[1], None) if left else slice(row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    return ids, mask


def test_left_padding_before_anything_is_coded(pair: Pair) -> None:
    rows = [tokens(20), tokens(47), tokens(5)]
    ids, mask = padded(rows)
    together = pair.generate(ids, pair.cache(), attention_mask=mask)
    for row, prompt in enumerate(rows):
        assert torch.equal(together[row, 47:], pair.generate(prompt)[0, prompt.shape[1] :])


def test_left_padding_far_beyond_the_first_blocks(pair: Pair) -> None:
    """The shortest row is padding for two blocks and more."""
    rows = [tokens(310), tokens(800), tokens(95)]
    ids, mask = padded(rows)
    out = pair.generate(ids, pair.cache(), attention_mask=mask, max_new_tokens=40)
    pair.require_greedy(out, 800, mask)
    for row, prompt in enumerate(rows):
        pair.require_greedy(torch.cat([prompt, out[row : row + 1, 800:]], 1), prompt.shape[1])


@torch.no_grad()
def test_right_padding_in_scoring(pair: Pair) -> None:
    """Logits of the real tokens, read in pieces, so that all but the first read codes."""
    rows = [tokens(500), tokens(790)]
    ids, mask = padded(rows, left=False)
    cache, pieces = pair.cache(), []
    for first in range(0, ids.shape[1], 100):
        piece = ids[:, first : first + 100]
        pieces.append(pair.forward(piece, cache, attention_mask=mask[:, : first + 100]))
    got = torch.cat(pieces, 1)
    for row, prompt in enumerate(rows):
        want = pair.model(prompt).logits[0]
        assert relative(got[row, : prompt.shape[1]], want) < NEAR


@torch.no_grad()
def test_mask_with_holes(pair: Pair) -> None:
    """Tokens hidden in the middle of the coded part stay hidden."""
    ids, mask = tokens(600), torch.ones(1, 620, dtype=torch.long)
    mask[0, 40:300] = 0
    more, results = tokens(20), []
    position = torch.arange(620)[None]
    for cache in (pair.cache(), pair.dense()):
        pair.forward(ids, cache, attention_mask=mask[:, :600], position_ids=position[:, :600])
        results.append(pair.forward(more, cache, attention_mask=mask, position_ids=position[:, 600:]))
    assert relative(*results) < NEAR


@pytest.mark.parametrize("batch", [1, 4])
def test_sequences_of_equal_length(pair: Pair, batch: int) -> None:
    prompt = tokens(700, batch)
    pair.require_greedy(pair.generate(prompt, pair.cache(), max_new_tokens=30), 700)
