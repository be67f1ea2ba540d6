"""Vision encoders: ViT, DeiT, DINOv2 and v3, vision towers of CLIP and SigLIP, Swin, SAM, Depth Anything, and timm's ViTs."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from spectralquant.integrations.encoder import EncoderEngine
from spectralquant.integrations.inputs import processed


def calibrate_vit(model: nn.Module, processor: Any, images: Iterable[Any], *, n_calib: int | None = None, batch_size: int = 8, **options: Any) -> EncoderEngine:
    """An engine that is calibrated on images.

    Args:
        model: A vision encoder, or a model around one.
        processor: Its image processor; None where `images` are batches already, see `inputs.Inputs`.
        images: What the processor takes.
        n_calib: Use so many; None for all.
        batch_size: Images at a time.
        options: Of `EncoderEngine`.

    Raises:
        As `EncoderEngine.calibrate`; ConfigError for arguments out of range.
    """
    engine = EncoderEngine(**options)
    engine.calibrate(model, processed(images, processor and (lambda batch: processor(images=batch, return_tensors="pt")), n_calib, batch_size))
    return engine


def apply_to_vit(model: nn.Module, engine: EncoderEngine) -> nn.Module:
    """`engine.apply_to(model)`."""
    return engine.apply_to(model)
