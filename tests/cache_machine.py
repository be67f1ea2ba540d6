"""Random programs on a `SpectralCache`, checked against plain tensors (`plain_cache`) after every step.

A program holds up to three caches that came from one by copying; what happens to one leaves the others as they are. `counts` says what was run.
"""

import copy
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import synthetic
import torch
from faults import FailingOperations
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plain_cache import PlainLayer, Row
from tiny_models import CONFIGS
from torch import Tensor
from transformers import DynamicCache

from spectralquant.cache import segment as segment_module
from spectralquant.cache.exact import entries_used
from spectralquant.cache.file import Identity
from spectralquant.cache.hf import SpectralCache
from spectralquant.cache.layers import CANDIDATES
from spectralquant.cache.segment import _OWN, Segment
from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.codec.layout import MASKED_GAIN, UNIT, unpack_gains, unpack_planes
from spectralquant.codec.packed import LazyKV, PackedKV
from spectralquant.config import CacheConfig, Dials
from spectralquant.presets import PRESETS
from spectralquant.rope import Rotary

HEADS, DIM, LAYERS = 2, 32, 2
LONGEST, MOST_ROWS, MOST_CACHES = 1400, 4, 3
QUANTIZERS = ("uniform", "joint")
SEEDS = st.integers(0, 2**31)
COUNTS = st.one_of(st.just(1), st.integers(1, 400), st.sampled_from([127, 128, 129, 255, 256, 257]))
FAILURES = st.builds(FailingOperations, st.integers(1, 250), st.sampled_from([torch.OutOfMemoryError, KeyboardInterrupt]), st.sampled_from([1, None]))
counts: Counter[str] = Counter()


@cache
def codecs(quantizer: str) -> dict[int, LayerCodec]:
    """Of two layers: one with an anchored frame, one without."""
    made = {}
    for index, rotary in enumerate((Rotary(synthetic.inv_freq(DIM // 2)), None)):
        profile = synthetic.profile(HEADS, DIM, (index,), rotary=rotary, exact_share=0.02)
        made[index] = build_codec(profile, PRESETS["high"], Dials(), "cpu", quantizer)[index]
    return made


def keys_and_values(codec: LayerCodec, rows: int, count: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of ordinary tokens, and of some that should stay exact: keys far off, or tiny values. Now and then most are."""
    make = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, HEADS, count, DIM, generator=make) for _ in range(2))
    keys = keys * codec.key.scale[:, None] + codec.key.mean[:, None]
    odd = torch.rand(rows, 1, count, 1, generator=make)
    share = (0.0, 0.02, 0.1, 0.6)[seed % 4]
    keys = torch.where(odd < share / 2, 12 * keys, keys)
    values = torch.where(odd > 1 - share / 2, 1e-3 * values, values)
    return keys.to(dtype), values.to(dtype)


class NoModel(torch.nn.Module):
    """What a file is loaded for where there are only codecs."""

    device = torch.device("cpu")


class Held:
    """A cache and what it should hold."""

    def __init__(self, cache: SpectralCache, plain: list[PlainLayer], padding: list[int] | None = None) -> None:
        self.cache, self.plain, self.padding = cache, plain, padding

    @property
    def length(self) -> int:
        return self.plain[0].length

    @property
    def rows(self) -> int:
        return len(self.plain[0].rows)

    def copy(self, deep: bool) -> "Held":
        return Held(copy.deepcopy(self.cache) if deep else self.cache.copy(), [p.copy() for p in self.plain], self.padding)


def finished(segment: Segment) -> Segment:
    """A segment with the same content that has nothing left to do; `segment` stays as it is."""
    other = copy.copy(segment)
    for name in _OWN:
        setattr(other, name, getattr(segment, name).clone())
    other.chosen = copy.deepcopy(segment.chosen)
    other.finish()
    return other


def view_of(segment: Segment) -> PackedKV:
    return segment._view(segment.recent_keys[:, :, : segment.recent], segment.recent_values[:, :, : segment.recent], segment.lengths)


def storages(tensors: list[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.untyped_storage().nbytes()}


def tensors_below(value: Any, found: list[Tensor] | None = None) -> list[Tensor]:
    """Every tensor that an object reaches by its attributes; codecs and settings are not gone into."""
    found = [] if found is None else found
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            tensors_below(item, found)
    elif not isinstance(value, (LayerCodec, CacheConfig, str, bytes, type)) and (hasattr(value, "__dict__") or hasattr(value, "__slots__")):
        names = vars(value) if hasattr(value, "__dict__") else value.__slots__
        for name in list(names):
            tensors_below(getattr(value, name), found)
    return found


class CacheMachine(RuleBasedStateMachine):
    """Rules are what users, `generate` and transformers do to a cache."""

    @initialize(
        quantizer=st.sampled_from(QUANTIZERS), window=st.sampled_from([1, 32, 128, 200]), sinks=st.sampled_from([0, 4, 7]), rows=st.integers(1, 3),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]), later=st.booleans(), exact=st.sampled_from([0.0, 0.04]),
    )  # fmt: skip
    def begin(self, quantizer: str, window: int, sinks: int, rows: int, dtype: torch.dtype, later: bool, exact: float) -> None:
        counts["programs"] += 1
        self.codecs, self.dtype, self.new_rows = codecs(quantizer), dtype, rows
        self.config = CacheConfig(window=window, sinks=sinks, max_exact_share=exact, tile_tokens=256)
        self.waits_later, segment_module.waits_later = segment_module.waits_later, lambda device: later
        self.held = [self.empty()]
        self.at = 0

    def teardown(self) -> None:
        if hasattr(self, "waits_later"):
            segment_module.waits_later = self.waits_later

    def empty(self) -> Held:
        return Held(self.cache(NoModel()), [PlainLayer(self.codecs[i], self.config, self.dtype) for i in range(LAYERS)])

    # As an engine has them, for `SpectralCache.load`.

    @property
    def cache_config(self) -> CacheConfig:
        return self.config

    def cache(self, model: Any) -> SpectralCache:
        config = copy.deepcopy(CONFIGS["llama"])
        config.num_hidden_layers = LAYERS
        return SpectralCache(config, self.codecs, self.config, Identity("weights", "float32", "calibration"))

    @property
    def it(self) -> Held:
        return self.held[self.at]

    def feed(self, held: Held, count: int, seed: int, layers: int = LAYERS, look: bool = True) -> None:
        """One forward pass's updates, of the first `layers` layers."""
        rows = held.rows or (len(held.padding) if held.padding is not None else self.new_rows)
        for index in range(layers):
            keys, values = keys_and_values(self.codecs[index], rows, count, seed + index, self.dtype)
            empty = held.plain[index].length == 0
            want = held.plain[index].update(keys, values, held.padding or [0] * rows)
            got = held.cache.update(keys, values, index)
            if empty:
                assert got[0] is keys and got[1] is values
            elif look:
                for which, x in zip(("keys", "values"), got, strict=True):
                    assert isinstance(x, LazyKV) and x.shape[2] == want[0].keys.shape[1]
                    seen = x + 0
                    seen[:, :, -count:] = held.plain[index].rounded(seen[:, :, -count:])  # some are not in the window yet
                    self.same(seen, want, which)

    def same(self, got: Tensor, rows: list[Row], which: str) -> None:
        want = torch.stack([getattr(row, which) for row in rows])
        assert torch.equal(got, want), f"{which} differ at slots {(got != want).any(-1).any(1).nonzero()[:5].tolist()}"

    # Rules ----------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.it.length < LONGEST)
    @rule(count=COUNTS, seed=SEEDS)
    def append(self, count: int, seed: int) -> None:
        counts["append"] += 1
        self.feed(self.it, count, seed)

    @precondition(lambda self: self.it.length < LONGEST)
    @rule(count=st.integers(2, 150), seed=SEEDS)
    def append_one_by_one(self, count: int, seed: int) -> None:
        counts["append_one_by_one"] += 1
        for i in range(count):
            self.feed(self.it, 1, seed + i, look=i == count - 1)

    @precondition(lambda self: self.it.length)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        """To any length: most often near the end, to borders of units, to nothing, and to all there is."""
        counts["crop"] += 1
        total = self.it.length
        borders = [min(max(UNIT * (total // UNIT) + d, 0), total) for d in (-UNIT, -1, 0, 1)]
        length = data.draw(st.one_of(st.integers(max(total - 10, 0), total), st.integers(0, total), st.sampled_from([0, 1, *borders, total])))
        if length < total:
            self.it.cache.crop(length - total)
        self.crop_plain(self.it, length)

    def crop_plain(self, held: Held, length: int) -> None:
        for plain in held.plain:
            plain.crop(length)
        if length == 0:
            held.padding = None

    @precondition(lambda self: self.it.length)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        counts["roll_back"] += 1
        length = data.draw(st.one_of(st.integers(max(self.it.length - 30, 0), self.it.length), st.integers(0, self.it.length)))
        self.it.cache.roll_back(length)
        self.crop_plain(self.it, length)

    @precondition(lambda self: self.it.length < LONGEST)
    @rule(count=COUNTS, seed=SEEDS)
    def interrupted_pass(self, count: int, seed: int) -> None:
        """The second layer never gets its tokens."""
        counts["interrupted_pass"] += 1
        before = self.it.length
        self.feed(self.it, count, seed, layers=1)
        self.it.cache.roll_back(before)
        self.crop_plain(self.it, before)

    @precondition(lambda self: self.it.length)
    @rule()
    def reset(self) -> None:
        counts["reset"] += 1
        self.it.cache.reset()
        self.crop_plain(self.it, 0)

    @precondition(lambda self: self.it.rows)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        counts["reorder"] += 1
        order = data.draw(st.lists(st.integers(0, self.it.rows - 1), min_size=self.it.rows, max_size=self.it.rows))
        self.it.cache.reorder_cache(torch.tensor(order))
        self.take(order)

    @precondition(lambda self: 0 < self.it.rows <= MOST_ROWS // 2)
    @rule(repeats=st.integers(1, 2))
    def repeat_interleave(self, repeats: int) -> None:
        counts["repeat_interleave"] += 1
        self.it.cache.batch_repeat_interleave(repeats)
        self.take([i for i in range(self.it.rows) for _ in range(repeats)])

    @precondition(lambda self: self.it.rows)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        counts["select"] += 1
        rows = data.draw(st.lists(st.integers(0, self.it.rows - 1), min_size=1, max_size=MOST_ROWS))
        self.it.cache.batch_select_indices(torch.tensor(rows))
        self.take(rows)

    def take(self, rows: list[int]) -> None:
        for plain in self.it.plain:
            plain.take(rows)

    @precondition(lambda self: len(self.held) < MOST_CACHES)
    @rule(deep=st.booleans(), follow=st.booleans())
    def copy(self, deep: bool, follow: bool) -> None:
        """The program goes on with either of the two."""
        counts["copy"] += 1
        self.held.append(self.it.copy(deep))
        if follow:
            self.at = len(self.held) - 1

    @precondition(lambda self: len(self.held) > 1)
    @rule(data=st.data())
    def turn_to(self, data: st.DataObject) -> None:
        counts["turn_to"] += 1
        self.at = data.draw(st.integers(0, len(self.held) - 1))

    @precondition(lambda self: len(self.held) > 1)
    @rule()
    def drop(self) -> None:
        """The others go on without it."""
        counts["drop"] += 1
        del self.held[self.at]
        self.at = 0

    @precondition(lambda self: self.it.length)
    @rule(data=st.data())
    def offload(self, data: st.DataObject) -> None:
        """On a machine without an accelerator both stay where they are; what they do to a segment is the same."""
        counts["offload"] += 1
        layer = self.it.cache.layers[data.draw(st.integers(0, LAYERS - 1))]
        if layer.is_initialized:
            layer.offload()
            if data.draw(st.booleans()):
                layer.prefetch()

    @precondition(lambda self: self.it.length == 0 and self.it.padding is None)
    @rule(starts=st.lists(st.sampled_from([0, 1, 3, 60, 128, 200]), min_size=1, max_size=3))
    def set_padding(self, starts: list[int]) -> None:
        """Sequences of a batch start at different slots; one starts at the first."""
        counts["set_padding"] += 1
        starts = [s - min(starts) for s in starts]
        mask = torch.arange(max(starts) + 1)[None] >= torch.tensor(starts)[:, None]
        self.it.cache.set_padding(mask.long())
        self.it.padding = starts

    @precondition(lambda self: not self.it.plain[0].candidates)
    @rule()
    def expect_candidates(self) -> None:
        """As assisted decoding says it."""
        counts["expect_candidates"] += 1
        for layer, plain in zip(self.it.cache.coded_layers, self.it.plain, strict=True):
            layer.activate_past_recording()
            plain.candidates = CANDIDATES

    @precondition(lambda self: self.it.length)
    @rule(more=st.one_of(st.none(), st.integers(0, 500)))
    def expect(self, more: int | None) -> None:
        counts["expect"] += 1
        self.it.cache.expect(None if more is None else self.it.length + more)

    @precondition(lambda self: self.it.rows == 0)
    @rule(count=COUNTS, seed=SEEDS)
    def fill(self, count: int, seed: int) -> None:
        counts["fill"] += 1
        rows = len(self.it.padding) if self.it.padding is not None else self.new_rows
        dense = DynamicCache()
        for index, plain in enumerate(self.it.plain):
            keys, values = keys_and_values(self.codecs[index], rows, count, seed + index, self.dtype)
            dense.update(keys, values, index)
            plain.update(keys, values, self.it.padding or [0] * rows)
        self.it.cache.fill(dense)

    @precondition(lambda self: self.it.length)
    @rule(follow=st.booleans())
    def save_and_load(self, follow: bool) -> None:
        """The file is gone once it was read: what is mapped stays."""
        counts["save_and_load"] += 1
        with TemporaryDirectory() as folder:
            path = self.it.cache.save(Path(folder) / "cache")
            loaded = SpectralCache.load(path, NoModel(), self)
        plain = [p.copy() for p in self.it.plain]
        for p in plain:
            p.candidates = CANDIDATES if p.recent > self.config.window + UNIT else 0
            p.room = self.config.window + UNIT + p.candidates
        if follow or len(self.held) == MOST_CACHES:
            self.held[self.at] = Held(loaded, plain)
        else:
            self.held.append(Held(loaded, plain))

    # What fails -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.it.length < LONGEST)
    @rule(count=COUNTS, seed=SEEDS, failure=FAILURES)
    def failing_pass(self, count: int, seed: int, failure: FailingOperations) -> None:
        """`roll_back` makes up for it. A block that was due may have been packed: that does not depend on what comes."""
        counts["failing_pass"] += 1
        held, before = self.it, self.it.length
        rows = held.rows or (len(held.padding) if held.padding is not None else self.new_rows)
        failing = failure.again()
        for index, (layer, plain) in enumerate(zip(held.cache.coded_layers, held.plain, strict=True)):
            keys, values = keys_and_values(self.codecs[index], rows, count, seed + index, self.dtype)
            try:
                with failing:
                    held.cache.update(keys, values, index)
            except failure.error:
                counts["failed"] += 1
                if layer.segment is not None and layer.segment.packed > plain.packed:
                    plain.pack_due()
                held.cache.roll_back(before)
                self.crop_plain(held, before)
                return
            plain.update(keys, values, held.padding or [0] * rows)

    @precondition(lambda self: self.it.length)
    @rule(data=st.data(), failure=FAILURES)
    def failing_change(self, data: st.DataObject, failure: FailingOperations) -> None:
        """All or nothing, in all layers."""
        counts["failing_change"] += 1
        held, length, made = self.it, data.draw(st.integers(1, self.it.length)), list[SpectralCache]()
        order = torch.tensor(data.draw(st.lists(st.integers(0, held.rows - 1), min_size=held.rows, max_size=held.rows)))
        changes: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "crop": (lambda: held.cache.crop(length - held.length), lambda: self.crop_plain(held, length)),
            "reorder": (lambda: held.cache.reorder_cache(order), lambda: self.take(order.tolist())),
            "select": (lambda: held.cache.batch_select_indices(order), lambda: self.take(order.tolist())),
            "copy": (lambda: made.append(held.cache.copy()), lambda: None),
        }
        change, in_plain = changes[data.draw(st.sampled_from([name for name in changes if name != "crop" or length < held.length]))]
        try:
            with failure.again():
                change()
        except failure.error:
            counts["failed"] += 1
        else:
            in_plain()

    # Invariants -----------------------------------------------------------------------------------------------------

    @invariant()
    def all_are_as_they_should_be(self) -> None:
        owned: dict[int, int] = {}
        for number, held in enumerate(getattr(self, "held", ())):
            assert held.cache.get_seq_length() == held.length
            for layer, plain in zip(held.cache.coded_layers, held.plain, strict=True):
                if layer.segment is None:
                    assert plain.length == 0
                    continue
                self.check(layer.segment, plain)
                for where in storages([*(getattr(layer.segment, name) for name in _OWN), *tensors_below(layer.segment.chosen)]):
                    assert owned.setdefault(where, number) == number, "copies share what is written"
                if held.length and plain.packed:
                    counts["units"] += plain.packed // UNIT * len(plain.rows)
            counts["checks"] += 1

    def check(self, segment: Segment, plain: PlainLayer) -> None:
        segment = finished(segment)
        assert (segment.packed, segment.recent) == (plain.packed, plain.recent)
        assert segment.lengths.tolist() == [[plain.packed // UNIT, plain.recent]] * len(segment.start)
        if not plain.rows:
            return
        assert segment.start.tolist() == [row.start for row in plain.rows] == list(segment.padding)
        view = view_of(segment)
        for which, name in (("key", "keys"), ("value", "values")):
            self.same(view.dense(which), plain.rows, name)
        self.check_codes(segment, view, plain)
        self.check_exact(segment, plain)

    def check_codes(self, segment: Segment, view: PackedKV, plain: PlainLayer) -> None:
        """Planes and gains of every unit; gains are masked at exact slots and padding, and nowhere else."""
        units = plain.packed // UNIT
        key, key_gain, value, value_gain = segment.codec.layout.split(view.units(0, units))
        read = unpack_planes(key, "key"), unpack_gains(key_gain), unpack_planes(value, "value"), unpack_gains(value_gain)
        for index, row in enumerate(plain.rows):
            for got, wants in zip(read, zip(*(codes.parts for codes in row.codes), strict=True), strict=False):
                assert torch.equal(got[index], torch.stack(wants, 1)), "codes differ"
            masked = (read[1][index] == MASKED_GAIN).flatten(1)
            want = [slot in row.exact or slot < row.start for slot in range(plain.packed)]
            assert masked.tolist() == [want] * HEADS

    def check_exact(self, segment: Segment, plain: PlainLayer) -> None:
        used = entries_used(segment.lengths[0, 0], segment.start, segment.secondary, self.config.sinks)
        for slots, count, secondary, row in zip(segment.exact_slots.tolist(), used.tolist(), segment.secondary.tolist(), plain.rows, strict=True):
            assert slots[:count] == sorted(row.exact) and all(s < 0 or s >= plain.packed for s in slots[count:])
            assert secondary == plain.secondary(row) <= plain.allowed(plain.packed)

    @invariant()
    def every_byte_is_counted(self) -> None:
        for held in getattr(self, "held", ()):
            if any(layer.segment is not None and layer.segment._unfinished is not None for layer in held.cache.coded_layers):
                continue  # asking would finish it
            found = storages([t for layer in held.cache.coded_layers for t in tensors_below(layer.segment)])
            assert held.cache.nbytes == sum(found.values())
