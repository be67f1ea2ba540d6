"""Textures that differ in second-order statistics alone: which orientation and which band of spatial frequency their noise has.

An image is Gaussian noise filtered to one of 4 orientations x 2 bands, its class. A patch of another class covers about a fifth of it, so that the
whole image has to be looked at; white noise, a slope of brightness, a random mean and a random contrast lie on top. No pixel, and no mean of pixels,
tells the class. 32 x 32 pixels in patches of 4: 65 tokens of a vision transformer.
"""

import math
from collections.abc import Iterator

import torch
from base import SMALL, Batch, Split, Task, batch_numbers, random_stream
from torch import Tensor
from transformers import PretrainedConfig, ViTConfig, ViTForImageClassification

SIDE, PATCH, BATCH = 32, 4, 64
ORIENTATIONS, BANDS = 4, (0.14, 0.24)
CLASSES = ORIENTATIONS * len(BANDS)
WIDTH, SPREAD = 0.06, 0.45
"""Standard deviations of a filter: cycles per pixel along the frequency, radians across the orientation."""
NOISE, COVERED = 1.6, 14
"""Standard deviation of white noise beside a texture of 1; side of the patch of another class."""
TEST_BATCHES = 24


def config() -> PretrainedConfig:
    return ViTConfig(**SMALL, num_hidden_layers=3, image_size=SIDE, patch_size=PATCH, num_channels=1, num_labels=CLASSES)


def filters() -> Tensor:
    """Gain [classes, SIDE, SIDE] on the frequencies of a 2-D Fourier transform; a texture's pixels have mean 0 and variance 1."""
    frequency = torch.fft.fftfreq(SIDE)
    down, right = torch.meshgrid(frequency, frequency, indexing="ij")
    radius, angle = torch.hypot(down, right), torch.atan2(down, right)
    gains = []
    for label in range(CLASSES):
        band, turn = BANDS[label // ORIENTATIONS], math.pi * (label % ORIENTATIONS) / ORIENTATIONS
        off = torch.remainder(angle - turn + math.pi / 2, math.pi) - math.pi / 2  # orientations have no sign
        gain = torch.exp(-((radius - band) ** 2) / (4 * WIDTH**2) - off**2 / (4 * SPREAD**2))
        gain[0, 0] = 0
        gains.append(gain / gain.square().mean().sqrt())
    return torch.stack(gains)


def texture(labels: Tensor, gains: Tensor, random: torch.Generator) -> Tensor:
    """Filtered noise [B, SIDE, SIDE]."""
    white = torch.randn(len(labels), SIDE, SIDE, generator=random)
    return torch.fft.ifft2(torch.fft.fft2(white) * gains[labels]).real


def images(labels: Tensor, gains: Tensor, random: torch.Generator) -> Tensor:
    """Images [B, SIDE, SIDE] of these classes, with everything that says nothing of them."""
    count = len(labels)
    others = (labels + torch.randint(1, CLASSES, (count,), generator=random)) % CLASSES
    corner = torch.randint(SIDE - COVERED + 1, (2, count, 1), generator=random)
    place = torch.arange(SIDE)
    down, right = (place >= corner) & (place < corner + COVERED)
    mixed = torch.where(down[:, :, None] & right[:, None, :], texture(others, gains, random), texture(labels, gains, random))
    noisy = mixed + NOISE * torch.randn(mixed.shape, generator=random)
    slope, mean = torch.randn(2, count, 1, 1, generator=random), torch.randn(count, 1, 1, generator=random)
    line = (place - (SIDE - 1) / 2) / SIDE
    contrast = torch.exp(0.4 * torch.randn(count, 1, 1, generator=random))
    return contrast * (noisy + slope[0] * line[:, None] + slope[1] * line) / 2 + 0.5 * mean


def batches(split: Split, seed: int) -> Iterator[Batch]:
    random, gains = random_stream(split, seed), filters()
    for _ in batch_numbers(split, TEST_BATCHES):
        labels = torch.randint(CLASSES, (BATCH,), generator=random)
        yield {"pixel_values": images(labels, gains, random)[:, None], "labels": labels}


TEXTURES = Task("textures", ViTForImageClassification, config, batches, steps=400, learning_rate=1e-3)
