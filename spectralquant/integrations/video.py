"""Video encoders: VideoMAE, ViViT, TimeSformer."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from spectralquant.integrations.encoder import EncoderEngine
from spectralquant.integrations.inputs import processed


def calibrate_videomae(
    model: nn.Module, processor: Any, video_clips: Iterable[Any], *, n_calib: int | None = None, batch_size: int = 2, **options: Any
) -> EncoderEngine:
    """An engine that is calibrated on clips, each a list of frames; the rest as for `vision.calibrate_vit`."""
    engine = EncoderEngine(**options)
    engine.calibrate(model, processed(video_clips, processor and (lambda batch: processor(batch, return_tensors="pt")), n_calib, batch_size))
    return engine


def apply_to_videomae(model: nn.Module, engine: EncoderEngine) -> nn.Module:
    """`engine.apply_to(model)`."""
    return engine.apply_to(model)
