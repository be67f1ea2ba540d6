"""Tokens into pages, one by one: a token is coded as soon as it is there, so a page is complete at any time, whatever happens to its request.

Which tokens of a page stand apart from its codes is decided in order: the sinks, and of the others those that need it (`LayerCodec.exact_need`) as long as
there is room. So it makes no difference whether they came in one piece or in many. Writing a token drops what the page had from there on: of an earlier owner,
or of drafts that were rejected.

All of it is a fixed sequence of launches on tensors of fixed shapes, which a CUDA graph may repeat.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import MASKED_GAIN, UNIT
from spectralquant.paged.layout import PageLayout, to_8_bits, token_bytes
from spectralquant.profile import NORM_FLOOR

AT_ONCE = 2048
"""Tokens coded at a time: what is made on the way takes some hundred bytes per plane and head."""


Average = Callable[[Tensor], Tensor]
"""Mean of a tensor over the processes that hold a layer's heads."""


def write_tokens(
    codec: LayerCodec, layout: PageLayout, pages: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, serials: Tensor, sinks: int,
    average: Average | None = None,
) -> None:  # fmt: skip
    """Write tokens to their slots. Tokens of a request come one after another in ascending order.

    Args:
        codec: The layer's codec.
        layout: Of the pages.
        pages: [pages, page_bytes] uint8.
        keys, values: [N, H, D], keys after their rotary embedding.
        slots: [N] int64, 128 * page + place; -1: a token that is not to be written.
        positions: [N] int64, in their sequences.
        serials: [N] int64, the serial number of the token's page; counts for tokens that are the first of their page.
        sinks: First tokens of a sequence that stay exact.
        average: Where several processes hold heads of the layer: they decide together.
    """
    for first in range(0, len(slots), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        _write(codec, layout, pages, keys[part], values[part], slots[part], positions[part], serials[part], sinks, average)


def _write(
    codec: LayerCodec, layout: PageLayout, pages: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, serials: Tensor, sinks: int,
    average: Average | None,
) -> None:  # fmt: skip
    page, place = (slots // UNIT).clamp_min(0), slots % UNIT
    dtype = codec.exact_dtype_for(keys.dtype)
    keys, values = (x.to(dtype).transpose(0, 1)[None] for x in (keys, values))  # [1, H, N, D], the same bits as in an exact copy
    centred = codec.centre_keys(keys, positions, positions.new_zeros(1))  # without padding a position is a slot
    key_planes, key_gains = codec.key.encode(centred)
    value_planes, value_gains = codec.value.encode(codec.centre_values(values))
    error, size = codec.key.error(centred, key_planes, key_gains), codec.value_size(values)
    if average is not None:
        error, size = over_processes(codec, error, size, average)
    need = codec.exact_need(size, codec.relative_error(error))[0]
    wanted = ((need > 1) | (positions < sinks)) & (slots >= 0)
    # Tokens of one page follow each other, also in parts of AT_ONCE; the first one of them knows where writing begins.
    is_first = torch.cat([page.new_ones(1, dtype=torch.bool), page[1:] != page[:-1]]) & (slots >= 0)
    index = torch.arange(len(page), device=page.device)
    first = torch.where(is_first, index, 0).cummax(0).values
    entry = _drop_from(layout, pages, torch.where(is_first, page, 0), place)[first] + _rank(wanted, first)
    exact = wanted & (entry < layout.exact)
    _write_codes(layout, pages, page, place, torch.cat([key_planes, value_planes], -1)[0])
    _write_gains(layout, pages, page, place, torch.stack([key_gains[0], value_gains[0]], -1).masked_fill(exact[:, None], MASKED_GAIN))
    _write_exact(layout, pages, torch.where(exact, page, 0), torch.where(exact, entry, 0), place, keys[0], values[0])
    begins = torch.where(is_first & (place == 0), page, 0)
    layout.serials(pages)[begins] = serials


def over_processes(codec: LayerCodec, error: Tensor, size: Tensor, average: Average) -> tuple[Tensor, Tensor]:
    """Errors of K and |v|^2, both [1, H, N], such that what is decided from them is decided from all heads of the layer."""
    norm = codec.value_norm[:, None]
    means = average(torch.stack([error.mean(1), (size.clamp_min(NORM_FLOOR) / norm).mean(1)]))
    return means[0, :, None].expand_as(error).contiguous(), (means[1, :, None] * norm).contiguous()


def _rank(wanted: Tensor, first: Tensor) -> Tensor:
    """[N]: how many `wanted` tokens of the same page come before each; `first` [N]: index of the first token of its page."""
    before = wanted.cumsum(0) - wanted.long()
    return before - before[first]


def _drop_from(layout: PageLayout, pages: Tensor, page: Tensor, place: Tensor) -> Tensor:
    """Forget what pages [N] have from places [N] on. Returns how many exact tokens they keep, [N]."""
    places = layout.places(pages)
    held = places[page]
    kept = (held >= 0) & (held < place[:, None])
    places[page] = torch.where(kept, held, -1)
    later = torch.arange(UNIT, device=page.device) >= place[:, None]  # [N, 128]
    bytes_of = token_bytes(layout.record, page.device).gains  # [128, 2]
    records = layout.records(pages)
    at = page[:, None, None], slice(None), bytes_of[None]
    gains = records[at]  # [N, 128, 2, H]
    records[at] = gains.masked_fill(later[:, :, None, None], MASKED_GAIN)
    return kept.sum(-1)


def _write_codes(layout: PageLayout, pages: Tensor, page: Tensor, place: Tensor, planes: Tensor) -> None:
    """planes [H, N, P_K + P_V] of tokens. A byte holds four of them, so what is added is the change of a token's own two bits: sums of changes come out right
    modulo 256, in whatever order."""
    where = token_bytes(layout.record, page.device)
    head = torch.arange(layout.heads, device=page.device)[:, None] * layout.record.record_bytes
    at = where.codes[place][:, None] + head  # [N, H, P]
    shift = where.shift[place][:, None, None]
    rows = page[:, None, None].expand_as(at)
    now = (pages[rows, at] >> shift) & 3
    pages.index_put_((rows, at), (planes.transpose(0, 1) - now) << shift, accumulate=True)


def _write_gains(layout: PageLayout, pages: Tensor, page: Tensor, place: Tensor, gains: Tensor) -> None:
    """gains [H, N, 2]."""
    at = token_bytes(layout.record, page.device).gains[place]  # [N, 2]
    layout.records(pages)[page[:, None], :, at] = gains.permute(1, 2, 0)


def _write_exact(layout: PageLayout, pages: Tensor, page: Tensor, entry: Tensor, place: Tensor, keys: Tensor, values: Tensor) -> None:
    """keys, values [H, N, D], to entries [N] of pages [N]."""
    integers, exponents = to_8_bits(torch.stack([keys, values]))
    layout.places(pages)[page, entry] = place.to(torch.int8)
    layout.integers(pages)[page, :, :, entry] = integers.permute(2, 0, 1, 3)
    layout.exponents(pages)[page, :, :, entry] = exponents.permute(2, 0, 1)
