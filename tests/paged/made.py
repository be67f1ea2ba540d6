"""Codecs and sequences of made-up tokens."""

import synthetic
import torch
from cache import Sequence

from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.config import Dials
from spectralquant.presets import PRESETS
from spectralquant.rope import Rotary


def codec_of(heads: int = 2, dim: int = 64, anchored: bool = True, **choices: object) -> LayerCodec:
    rotary = Rotary(synthetic.inv_freq(dim // 2)) if anchored else None
    profile = synthetic.profile(heads, dim, (0,), rotary=rotary, exact_share=0.02, **{"exact_error": 0.0, **choices})
    return build_codec(profile, PRESETS["high"], Dials())[0]


def sequence_of(codec: LayerCodec, length: int, seed: int, small: tuple[int, ...] = ()) -> Sequence:
    torch.manual_seed(seed)
    keys, values = (torch.randn(codec.heads, length, codec.head_dim) for _ in range(2))
    values[:, list(small)] *= 0.01  # secondary sinks
    return Sequence(keys, values)


def typical_sequence(length: int, seed: int, heads: int = 2, dim: int = 64) -> Sequence:
    """Tokens as the codec expects them in the plain frame."""
    torch.manual_seed(seed)
    layer = synthetic.profile(heads, dim, (0,)).layers[0]
    return Sequence(synthetic.samples(layer.key, length)[0], synthetic.samples(layer.value, length)[0])
