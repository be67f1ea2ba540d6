"""What a calibration's spectra look like, in figures."""

from typing import Any

import torch

from spectralquant.codec.budget import coordinate_bits, plane_counts, semantic_size
from spectralquant.config import Dials
from spectralquant.presets import BIT_WIDTHS, CompressionPreset
from spectralquant.profile import KEY, VALUE, Profile


def spectrum_summary(profile: Profile, preset: CompressionPreset) -> dict[str, Any]:
    """{n_heads, d_eff_mean, d_eff_min, d_eff_max, gap_mean, gap_median} over K and V of all heads. d_eff: coordinates that hold the preset's share of the
    variance; gap: first variance / second."""
    variances = [side.variance for layer in profile.layers.values() for side in (layer.key, layer.value)]
    sizes = torch.tensor([semantic_size(row[None], preset.d_eff_variance) for v in variances for row in v]).double()
    gaps = torch.cat([v[:, 0] / v[:, 1].clamp_min(1e-20) for v in variances]).double()
    return {
        "n_heads": sum(layer.heads for layer in profile.layers.values()),
        "d_eff_mean": float(sizes.mean()),
        "d_eff_min": int(sizes.min()),
        "d_eff_max": int(sizes.max()),
        "gap_mean": float(gaps.mean()),
        "gap_median": float(gaps.median()),
    }


def describe_heads(profile: Profile, preset: CompressionPreset) -> list[dict[str, Any]]:
    """A line for K and for V of every head: {layer, head, side, d_eff, variance, bits, widths}.

    `bits` is the mean width of a coordinate and `widths` how many coordinates have which, as water is filled over the spectrum; jointly quantized values
    have the same bits in all, spread over blocks of coordinates.
    """
    lines: list[dict[str, Any]] = []
    planes = dict(zip((KEY, VALUE), plane_counts(profile, preset, Dials()), strict=True))
    for index, layer in profile.layers.items():
        for side in (KEY, VALUE):
            variance = getattr(layer, side).variance
            for head, widths in enumerate(coordinate_bits(variance, planes[side], Dials(), preset, side)):
                counts = {str(width): int((widths == width).sum()) for width in BIT_WIDTHS}
                spectrum = variance[head].tolist()
                size = semantic_size(variance[head][None], preset.d_eff_variance)
                bits = float(widths.double().mean())
                lines.append({"layer": index, "head": head, "side": side, "d_eff": size, "variance": spectrum, "bits": bits, "widths": counts})
    return lines
