"""Audio encoders: Whisper's, wav2vec2."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from spectralquant.integrations.encoder import EncoderEngine
from spectralquant.integrations.inputs import processed


def calibrate_audio(
    model: nn.Module, processor: Any, clips: Iterable[Any], sampling_rate: int, *, n_calib: int | None = None, batch_size: int = 4, **options: Any
) -> EncoderEngine:
    """An engine that is calibrated on clips [samples] at `sampling_rate` Hz; the rest as for `vision.calibrate_vit`."""
    process = processor and (lambda batch: processor(batch, sampling_rate=sampling_rate, return_tensors="pt", padding=True))
    engine = EncoderEngine(**options)
    engine.calibrate(model, processed(clips, process, n_calib, batch_size))
    return engine


def apply_to_audio(model: nn.Module, engine: EncoderEngine) -> nn.Module:
    """`engine.apply_to(model)`."""
    return engine.apply_to(model)
