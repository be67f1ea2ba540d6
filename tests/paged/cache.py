"""A paged cache of one layer with a block allocator as servers have one, for tests."""

from dataclasses import dataclass, field, replace
from typing import Any

import synthetic
import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.codec.layout import UNIT
from spectralquant.config import Backend, Dials
from spectralquant.paged.layer import PagedLayer, Scoring
from spectralquant.paged.recent import RecentPages, Step
from spectralquant.presets import PRESETS
from spectralquant.rope import Rotary

EXACT, SINKS = 8, 1


@dataclass
class Sequence:
    """Tokens so far, and where they stand."""

    keys: Tensor  # [H, T, D]
    values: Tensor
    pages: list[int] = field(default_factory=list)
    length: int = 0


def codec_of(
    heads: int = 2, dim: int = 64, anchored: bool = True, device: str = "cpu", groups: int = 0, quantizer: str = "uniform", **choices: Any
) -> LayerCodec:
    """groups: query heads per KV head that have a missing mass; 0: none has."""
    rotary = Rotary(synthetic.inv_freq(dim // 2)) if anchored else None
    profile = synthetic.profile(heads, dim, (0,), rotary=rotary, exact_share=0.02, **{"exact_error": 0.0, **choices})
    layer = replace(profile.layers[0], missing_mass=0.1 * torch.randn(heads, groups) if groups else None)
    return build_codec(replace(profile, layers={0: layer}), PRESETS["high"], Dials(), device, quantizer)[0]


def sequence_of(codec: LayerCodec, length: int, seed: int, small: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Sequence:
    torch.manual_seed(seed)
    keys, values = (torch.randn(codec.heads, length, codec.head_dim) for _ in range(2))
    values += codec.value.mean.cpu()[:, None]
    values[:, list(small)] *= 0.01  # secondary sinks
    device = codec.value_norm.device
    return Sequence(keys.to(device, dtype), values.to(device, dtype))


def typical_sequence(length: int, seed: int, heads: int = 2, dim: int = 64) -> Sequence:
    """Tokens as the codec expects them in the plain frame."""
    torch.manual_seed(seed)
    layer = synthetic.profile(heads, dim, (0,)).layers[0]
    return Sequence(synthetic.samples(layer.key, length)[0], synthetic.samples(layer.value, length)[0])


class PagedCache:
    """One layer, its pages, and who has them. Memory is as a server leaves it: full of anything."""

    def __init__(
        self, codec: LayerCodec, pages: int = 64, copies: int = 24, dtype: torch.dtype = torch.float32, scoring: Scoring | None = None, exact: int = EXACT,
        spare: int = 0, backend: Backend = "auto",
    ) -> None:  # fmt: skip
        self.layer = PagedLayer(codec, dtype, exact, SINKS, copies, backend)
        make = torch.Generator().manual_seed(5)
        device, size = codec.value_norm.device, self.layer.layout.page_bytes
        self.pages = torch.randint(0, 256, (pages, size + spare), dtype=torch.uint8, generator=make).to(device)[:, :size]
        self.recent = RecentPages(copies, pages, device)
        self.free = list(range(pages - 1, 0, -1))  # page 0 is nobody's
        self.scoring = scoring or Scoring()

    def step(self, work: list[tuple[Sequence, int]], groups: int = 2, padding: int = 3) -> list[Tensor]:
        """Take so many next tokens of every sequence. Returns attention [H G, Q, D] of a random query for each."""
        step, keys, values = self.plan(work, padding)
        make = torch.Generator().manual_seed(sum(s.length for s, _ in work))
        query = torch.randn(len(keys), keys.shape[1] * groups, keys.shape[2], generator=make).to(keys)
        out = torch.full_like(query, torch.nan)
        self.layer.store(self.pages, keys, values, step)
        self.layer.attend(query, keys, values, self.pages, step, self.scoring, out)
        result, first = [], 0
        for sequence, count in work:
            sequence.length += count
            result.append((query[first : first + count].transpose(0, 1), out[first : first + count].transpose(0, 1)))
            first += count
        return result

    def plan(self, work: list[tuple[Sequence, int]], padding: int) -> tuple[Step, Tensor, Tensor]:
        slots, keys, values, starts = [], [], [], [0]
        for sequence, count in work:
            first, last = sequence.length, sequence.length + count
            while len(sequence.pages) * UNIT < last:
                sequence.pages.append(self.free.pop())
            slots += [sequence.pages[t // UNIT] * UNIT + t % UNIT for t in range(first, last)]
            keys.append(sequence.keys[:, first:last].transpose(0, 1))
            values.append(sequence.values[:, first:last].transpose(0, 1))
            starts.append(starts[-1] + count)
        nothing = keys[0].new_full((padding, *keys[0].shape[1:]), torch.nan)
        device, width = self.pages.device, max(len(s.pages) for s, _ in work)
        table = torch.tensor([s.pages + [0] * (width - len(s.pages)) for s, _ in work], dtype=torch.int32)
        before = torch.tensor([s.length for s, _ in work], dtype=torch.int32)
        after = torch.tensor([s.length + count for s, count in work], dtype=torch.int32)
        parts = [t.to(device) for t in (table, before, after, torch.tensor(starts, dtype=torch.int32), torch.tensor(slots + [-1] * padding))]
        step = self.recent.advance(*parts, max(count for _, count in work))
        return step, torch.cat([*keys, nothing]), torch.cat([*values, nothing])

    def drop(self, sequence: Sequence) -> None:
        """Its request is over."""
        self.free += sequence.pages
        sequence.pages, sequence.length = [], 0
