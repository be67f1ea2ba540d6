"""What a calibration's spectra look like, in figures."""

from typing import Any

import torch

from spectralquant.codec.budget import semantic_size
from spectralquant.presets import CompressionPreset
from spectralquant.profile import Profile


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
