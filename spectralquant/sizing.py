"""Whether a model, a batch and a context fit a device, from the model's configuration alone: no weights, no calibration.

A calibration decides how a preset's bytes are spent, not how many there are at most: a plan here is what the preset promises, and a cache takes no more.
Buffers of the forward pass are not in it; `SpectralQuantEngine.memory_plan` measures them where the model is loaded.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from spectralquant.cache.hf import coded_layer_indices, kv_size
from spectralquant.codec.budget import exact_bounds, plane_counts
from spectralquant.codec.layout import RecordLayout
from spectralquant.config import CacheConfig, Dials
from spectralquant.memory import LayerSize, MemoryPlan, Planner, largest, sliding_windows
from spectralquant.presets import CompressionPreset
from spectralquant.profile import Choices, LayerProfile, Profile, SideProfile

LONGEST, WIDEST = 1 << 26, 1 << 20
"""Where the search for the largest context and batch ends."""
UNCOMPRESSED = "FP16"


@dataclass(frozen=True, slots=True)
class Fit:
    """One way to keep the cache.

    Attributes:
        method: FP16, or a preset's name.
        cache: Bytes of batch x context tokens.
        total: With the weights and the codec's constants.
        ratio: FP16 cache / this one.
        fits, left: Whether `total` is within the memory, and what is left; None where no memory was named.
        most_context, most_batch: The largest that fit with the other as asked; None where no memory was named.
    """

    method: str
    cache: int
    total: int
    ratio: float
    fits: bool | None
    left: int | None
    most_context: int | None
    most_batch: int | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def fit(planner: Planner, preset: CompressionPreset | None, batch: int, context: int, new_tokens: int, memory: int | None) -> Fit:
    """Of `preset`, or of an uncompressed cache for None; bytes and tokens."""

    def cache(plan: MemoryPlan) -> int:
        return plan.dense_cache if preset is None else plan.cache

    def total(rows: int, tokens: int) -> int:
        plan = planner.plan(rows, tokens, new_tokens)
        return plan.weights + cache(plan) + (0 if preset is None else plan.codec)

    plan, needed = planner.plan(batch, context, new_tokens), total(batch, context)
    name, ratio = UNCOMPRESSED if preset is None else preset.name, plan.dense_cache / cache(plan)
    if memory is None:
        return Fit(name, cache(plan), needed, ratio, None, None, None, None)
    most_context = largest(lambda n: total(batch, n) <= memory, LONGEST)
    most_batch = largest(lambda n: total(n, context) <= memory, WIDEST)
    return Fit(name, cache(plan), needed, ratio, needed <= memory, memory - needed, most_context, most_batch)


def planner_for(model: PreTrainedModel, preset: CompressionPreset, element_bytes: int, config: CacheConfig | None = None) -> Planner:
    """For a model that is a configuration only (on the device "meta"), whose weights will have `element_bytes` each.

    Raises:
        UnsupportedModelError, ShapeError: The model can't be compressed; the text says why.
    """
    coded = coded_layer_indices(model)
    profile = nominal_profile(model, coded)
    layout = RecordLayout(*plane_counts(profile, preset, Dials()))
    planes = layout.key_planes + layout.value_planes
    bounds = exact_bounds(profile, preset, Dials(), planes)
    layers = tuple(LayerSize(layer.heads, layer.head_dim, layout.record_bytes, bounds[i]) for i, layer in profile.layers.items())
    matrices = sum(4 * layer.heads * layer.dim * (2 * layer.dim + planes) for layer in layers)  # float32; means and scales are nothing beside them
    codec = matrices + 4 * 2 * layers[0].dim * profile.choices.run  # and one table of turns
    weights = element_bytes * sum(p.numel() for p in model.parameters())
    return Planner(weights, codec, layers, sliding_windows(model, coded), config or CacheConfig())


def nominal_profile(model: PreTrainedModel, coded: list[int]) -> Profile:
    """A profile with the shapes of `model`, whose layers `coded` are packed, and no content."""
    layers: dict[int, LayerProfile] = {}
    for index in coded:
        heads, dim = kv_size(model.config, index)
        empty = torch.empty(heads, dim, device="meta")
        side = SideProfile(empty, torch.empty(heads, dim, dim, device="meta"), empty)
        layers[index] = LayerProfile(side, side, torch.empty(heads, device="meta"), 1.0)
    return Profile(layers, Choices(), {})
