"""The recipe of the original `spectralquant` package, 0.3.1, in its strongest fair reading: principal components of the keys as they are cached
(after the rotary embedding) and of the values, per head; bits by water-filling; static Lloyd-Max codes.

Static: levels are scaled by the variances of the calibration text, and no token has a gain of its own, so there is nothing to store beside the
codes. Where the original is weaker than its recipe it is given the better choice: the mean is taken off, statistics come from the
bundled corpus at all positions instead of from the first words of short sentences, and the first 4 and the newest 128 tokens stay exact, as in our own cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant.allocation import water_fill
from spectralquant.cache.hf import coded_layer_indices
from spectralquant.calibration.fit import fit_profile
from spectralquant.calibration.hf import collect, fingerprint
from spectralquant.codebook import lloyd_max_codebook
from spectralquant.corpus import make_samples
from spectralquant.errors import ProfileError
from spectralquant.evaluation.methods.base import Method, Subject
from spectralquant.evaluation.methods.simulated import Rule, simulated
from spectralquant.profile import Choices, Profile, SideProfile, load_profile

FILE = "pca.safetensors"
CHOICES = Choices(query_metric=False, output_metric=False, token_weights=False, exact_below=0.0, exact_error=0.0, run=0, trajectory=False)
"""Identity metrics, all tokens alike, and the plain frame: then a profile is mean, eigenvectors and eigenvalues of the covariance."""
WIDTHS = tuple(range(9))
SINKS, WINDOW = 4, 128


@dataclass(frozen=True, slots=True)
class StaticCode:
    """K or V of one layer.

    Attributes:
        mean: [H, 1, D].
        basis: [H, D, D], orthonormal columns.
        deviation: [H, 1, D], standard deviations of the coordinates.
        widths: [H, D] bits.
        boundaries: [H, D, 255], between the levels of a coordinate's width, then infinity.
        levels: [H, D, 256]; a coordinate of 0 bits has the level 0, its mean.
    """

    mean: Tensor
    basis: Tensor
    deviation: Tensor
    widths: Tensor
    boundaries: Tensor
    levels: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[B, H, n, D] -> what is decoded."""
        unit = ((x.float() - self.mean) @ self.basis) / self.deviation
        by_coordinate = unit.permute(1, 3, 0, 2).flatten(2).contiguous()  # [H, D, B * n]
        decoded = self.levels.gather(-1, torch.searchsorted(self.boundaries, by_coordinate)).unflatten(-1, (len(x), -1))
        return ((decoded.permute(2, 0, 3, 1) * self.deviation) @ self.basis.mT + self.mean).to(x.dtype)


def static_code(side: SideProfile, bits: float, device: torch.device) -> StaticCode:
    """The code of one side at a mean of `bits` per coordinate, rounded down to whole bits per vector."""
    widths = water_fill(side.variance, budget(bits, side.mean.shape[-1]), WIDTHS, "lloyd-max")
    boundaries, levels = torch.full((len(WIDTHS), 255), torch.inf), torch.zeros(len(WIDTHS), 256)
    for width in WIDTHS[1:]:
        book = lloyd_max_codebook(width)
        boundaries[width, : len(book.boundaries)], levels[width, : len(book.levels)] = book.boundaries, book.levels
    deviation = side.variance.sqrt()[:, None]
    return StaticCode(*(t.to(device) for t in (side.mean[:, None], side.basis, deviation, widths, boundaries[widths], levels[widths])))


def budget(bits: float, dim: int) -> int:
    """Bits of one vector."""
    return int(bits * dim)


def principal_components(subject: Subject) -> Profile:
    """The profile in the subject's folder; measured, and written there, when none was made for this model yet."""
    path = subject.folder / FILE
    found = _load(path, subject.model)
    if found is None:
        samples = make_samples(subject.tokenizer, None)
        found = fit_profile(collect(subject.model, samples.statistics, coded_layer_indices(subject.model)), CHOICES)
        found.save(path)
    return found


def _load(path: Path, model: PreTrainedModel) -> Profile | None:
    if not path.exists():
        return None
    try:
        profile = load_profile(path)
        profile.require_model(fingerprint(model))
    except ProfileError:  # damaged, or another model's: it only saves time, so it is made again
        return None
    return profile if profile.choices == CHOICES else None


def _rules(subject: Subject, bits: float) -> Callable[[int], Rule]:
    profile, device = principal_components(subject), subject.model.device
    rules = {
        index: Rule(static_code(layer.key, bits, device), static_code(layer.value, bits, device), key_window=WINDOW, value_window=WINDOW, sinks=SINKS)
        for index, layer in profile.layers.items()
    }
    return rules.__getitem__


def _pca(bits: float) -> Method:
    return simulated(
        f"pca{bits:g}",
        f"PCA, static Lloyd-Max, {bits:g} bits",
        "PCA, static Lloyd-Max",
        lambda subject: _rules(subject, bits),
        lambda dim: budget(bits, dim) / dim,
    )


METHODS = tuple(_pca(bits) for bits in (2.0, 2.375, 3.0))
