"""An archive model from a model: moments of keys and values over text, and what noise in each layer does to the output.

Both are taken with the uncompressed model. Noise in K or V of one layer alone, at attention sinks none, changes the logits of the tokens behind it; their KL
per unit of noise is what the layer's steps follow.
"""

import math
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from spectralquant.archive.predictor import SKIPPED, ArchiveModel, LayerArchive, Layers, Moments, fit_archive
from spectralquant.cache.hf import model_device, read_dense
from spectralquant.compat import cache_argument
from spectralquant.corpus import Samples
from spectralquant.errors import CalibrationError
from spectralquant.profile import Profile

FIT_TOKENS = 24_000
"""Of the text that moments are taken over."""
WINDOWS = 2
"""Held-out windows that sensitivities are measured on: each takes two forward passes for every layer."""
NOISE = (0.05, 0.1)
"""Noise in K and V that sensitivities are measured with, as a share of the power."""
SCORED = 96
"""Scored tokens of a window, at most half of it."""

Sensitivity = dict[int, tuple[float, float]]
"""Layer index -> KL that noise in K and in V alone makes, per unit of its share of the power."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """An archive model, where the model is, and the sensitivities that its steps follow; None where no window was given."""

    archive: ArchiveModel
    sensitivity: Sensitivity | None


@torch.no_grad()
def fit(model: PreTrainedModel, profile: Profile, samples: Samples, depth: int = 2, windows: int = WINDOWS, *, progress: bool = True) -> Fitted:
    """Fit an archive model.

    Args:
        model: Uncompressed, in evaluation mode.
        profile: Its calibration.
        samples: Of text.
        depth: See `Moments`.
        windows: So many of the held-out samples are taken for sensitivities; 0: noise is the same share of the power everywhere.
        progress: Show progress bars.

    Raises:
        CalibrationError: Logits are not finite.
    """
    moments = Moments(profile, depth)
    with tqdm(total=samples.tokens, unit="tok", desc="moments", disable=not progress) as bar:
        for sample in samples.statistics:
            moments.add(one_sequence(read_dense(model, sample.to(model_device(model))), profile.layers, model_device(model)))
            bar.update(sample.shape[1])
    archive, chosen = fit_archive(profile, moments).to(model_device(model)), samples.held_out[:windows]
    if not chosen:
        return Fitted(archive, None)
    with tqdm(total=2 * len(profile.layers) * len(chosen), unit="forward", desc="sensitivity", disable=not progress) as bar:
        measured = [sensitivity(model, archive, window.to(model_device(model)), bar.update) for window in chosen]
    felt: Sensitivity = {}
    for i in profile.layers:
        felt[i] = (sum(one[i][0] for one in measured) / len(measured), sum(one[i][1] for one in measured) / len(measured))
    if not all(math.isfinite(x) for pair in felt.values() for x in pair):
        raise CalibrationError("the logits behind noisy keys and values are not finite; try the model in bfloat16 or float32")
    weighed = felt if any(x > 0 for pair in felt.values() for x in pair) else None
    return Fitted(fit_archive(profile, moments, weighed).to(model_device(model)), felt)


def one_sequence(cache: DynamicCache, layers: Collection[int], device: torch.device) -> Layers:
    """Keys and values [H, T, D] of some layers of an uncompressed cache with one sequence, on one device."""
    held: list[Any] = list(cache.layers)
    return {i: (held[i].keys[0].to(device), held[i].values[0].to(device)) for i in layers}


def sensitivity(model: PreTrainedModel, archive: ArchiveModel, ids: Tensor, progress: Callable[[], Any]) -> Sensitivity:
    """Of every coded layer, from the last tokens of ids [1, T]."""
    split = ids.shape[1] - min(SCORED, ids.shape[1] // 2)
    context, make = read_dense(model, ids[:, :split]), torch.Generator().manual_seed(0)
    want, felt = _scored(model, deepcopy(context), ids[:, split:]), Sensitivity()
    for i, pair in one_sequence(context, archive.layers, model_device(model)).items():
        found: list[float] = []
        for s, noise in enumerate(NOISE):
            changed = deepcopy(context)
            layer: Any = changed.layers[i]
            for name, x in zip(("keys", "values"), _noisy(archive.layers[i], pair, s, make), strict=True):
                setattr(layer, name, x[None].to(getattr(layer, name)))
            got = _scored(model, changed, ids[:, split:])
            found.append(max(float((want.exp() * (want - got)).sum(-1).mean()), 0.0) / noise)  # rounding can leave -1e-9; NaN stays
            progress()
        felt[i] = (found[0], found[1])
    return felt


def _noisy(layer: LayerArchive, pair: tuple[Tensor, Tensor], which: int, make: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values, one of them with noise at all tokens but attention sinks."""
    keys, values = (x.float() for x in pair)
    exact = layer.is_sink(values)
    exact[:SKIPPED] = True
    side, y = layer.sides[which], layer.sides[which].enter((layer.turned_back(keys), values)[which])
    noise = torch.randn(y.shape, generator=make).to(y.device) * (NOISE[which] * y[~exact].square().mean()).sqrt()
    changed = side.leave(y + noise.masked_fill(exact[:, None], 0.0))
    return (layer.turned(changed), values) if which == 0 else (keys, changed)


def _scored(model: PreTrainedModel, cache: DynamicCache, ids: Tensor) -> Tensor:
    """Log-probabilities [T, vocabulary] of ids [1, T] after what `cache` holds."""
    return model(input_ids=ids, use_cache=True, **cache_argument(model, cache)).logits[0].float().log_softmax(-1)
