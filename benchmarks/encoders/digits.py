"""Handwritten digits: scikit-learn's 1,797 scans of 8 x 8 pixels, every pixel a token of a vision transformer (65 with the class token).

A quarter of the scans, drawn by the seed, is the test set. Training shifts the others by up to one pixel and adds a little noise.
"""

from collections.abc import Iterator

import torch
from base import SMALL, Batch, Split, Task, random_stream
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig, ViTConfig, ViTForImageClassification

SIDE, CLASSES, BATCH = 8, 10, 32
NOISE = 0.1


def config() -> PretrainedConfig:
    return ViTConfig(**SMALL, num_hidden_layers=3, image_size=SIDE, patch_size=1, num_channels=1, num_labels=CLASSES)


def split_digits(split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """Scans [N, 8, 8] in [0, 1] and their digits [N]: no scan is in both splits of a seed."""
    scans, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    kept = order[: len(order) // 4] if split == "test" else order[len(order) // 4 :]
    return torch.from_numpy(scans).float().view(-1, SIDE, SIDE)[kept] / 16, torch.from_numpy(digits).long()[kept]


def batches(split: Split, seed: int) -> Iterator[Batch]:
    scans, digits = split_digits(split, seed)
    if split == "test":
        yield from (as_batch(s, d) for s, d in zip(scans.split(BATCH), digits.split(BATCH), strict=True))
        return
    random = random_stream(split, seed)
    while True:
        for rows in torch.randperm(len(digits), generator=random).split(BATCH):
            yield as_batch(varied(scans[rows], random), digits[rows])


def varied(scans: Tensor, random: torch.Generator) -> Tensor:
    """Each scan shifted by -1, 0 or 1 pixels along both sides, with noise."""
    down, right = torch.randint(3, (2, len(scans)), generator=random)
    place = torch.arange(SIDE)
    rows, columns = down[:, None] + place, right[:, None] + place
    shifted = pad(scans, (1, 1, 1, 1))[torch.arange(len(scans))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted + NOISE * torch.randn(shifted.shape, generator=random)


def as_batch(scans: Tensor, digits: Tensor) -> Batch:
    return {"pixel_values": (2 * scans - 1)[:, None], "labels": digits}


DIGITS = Task("digits", ViTForImageClassification, config, batches, steps=1000, learning_rate=1e-3)
