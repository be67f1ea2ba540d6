"""Steps that stay where they are."""

from dataclasses import fields

import torch
from cache import PagedCache, codec_of, sequence_of

from spectralquant.paged.held_step import HeldStep


def test_every_step_lies_where_the_one_before_lay() -> None:
    codec = codec_of()
    cache, held = PagedCache(codec), HeldStep(sequences=4, tokens=64)
    sequences = [sequence_of(codec, 100, seed=i) for i in range(3)]
    first, _, _ = cache.plan([(s, 5) for s in sequences], padding=2)
    for s in sequences:
        s.length = 5
    second, _, _ = cache.plan([(s, 1) for s in sequences[:2]], padding=0)
    kept = held.hold(first)
    moved = held.hold(second)
    for field in fields(first):
        want, got, before = (getattr(step, field.name) for step in (second, moved, kept))
        if isinstance(want, torch.Tensor):
            assert torch.equal(got, want) and got.data_ptr() == before.data_ptr()
    assert moved.longest == 1
