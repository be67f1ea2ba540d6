"""Figures of a cache and of a calibration, as `stats` of a generation and `compression_stats` give them."""

from typing import Any

from spectralquant.cache.hf import SpectralCache
from spectralquant.codec.layout import RecordLayout
from spectralquant.presets import CompressionPreset
from spectralquant.profile import Profile
from spectralquant.spectra import spectrum_summary


def calibration_figures(profile: Profile, layout: RecordLayout, preset: CompressionPreset) -> dict[str, Any]:
    """{fp16_bytes_per_token, sq_key_bytes, sq_val_bytes, sq_ratio, d_eff, n_heads}: bytes of a token in all layers, the exact ones' share included.

    Args:
        profile: The calibration.
        layout: Of a layer's records.
        preset: What the spectrum is summed up for.
    """
    layers = profile.layers.values()
    exact = profile.exact_share * 2
    dense = sum(4 * layer.heads * layer.head_dim for layer in layers)
    key, value = (sum(layer.heads * (planes / 4 + 1 + exact * layer.head_dim) for layer in layers) for planes in (layout.key_planes, layout.value_planes))
    return {
        "fp16_bytes_per_token": dense,
        "sq_key_bytes": key,
        "sq_val_bytes": value,
        "sq_ratio": dense / (key + value),
        "d_eff": spectrum_summary(profile, preset)["d_eff_mean"],
        "n_heads": sum(layer.heads for layer in layers),
    }


def cache_figures(cache: SpectralCache, preset: CompressionPreset, new_tokens: int, seconds: float) -> dict[str, Any]:
    """What `cache` holds and takes, after `new_tokens` tokens in `seconds`."""
    segments = [layer.segment for layer in cache.coded_layers if layer.segment is not None]
    held, codec = cache.nbytes, cache.codec_bytes
    return {
        "seq_len": cache.get_seq_length(),
        "n_layers": len(cache.coded_layers),
        "n_kv_heads": segments[0].recent_keys.shape[1] if segments else 0,
        "fp16_bytes": cache.dense_bytes,
        "compressed_bytes": held,
        "ratio": cache.dense_bytes / held if held else 0.0,
        "codec_bytes": codec,
        "ratio_with_codec": cache.dense_bytes / (held + codec) if held + codec else 0.0,
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds if seconds else 0.0,
        "preset": preset.name,
    }


def how_decoded(cache: SpectralCache) -> dict[str, Any]:
    """{decode_mode, decode_reason, decode_replays} of the last generation, empty where there was none."""
    report = cache.decode_report
    return {} if report is None else {"decode_mode": report.mode, "decode_reason": report.reason, "decode_replays": report.replays}
