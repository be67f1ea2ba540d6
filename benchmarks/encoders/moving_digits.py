"""Clips of digits that move: the class is the digit times the direction, 40 in all.

A scan of scikit-learn's digits (those of the split) starts anywhere on a canvas of 16 x 16 pixels and moves up, down, left or right by a pixel per frame;
what leaves on one side comes back on the other. Its place in any one frame is therefore uniform whatever the direction: a frame alone says the digit and
nothing of the motion, and a clip played backwards is one of the opposite class. Eight frames in tubelets of 2 x 4 x 4 are 64 tokens.
"""

from collections.abc import Iterator

import torch
from base import SMALL, Batch, Split, Task, batch_numbers, random_stream
from digits import split_digits
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig, VideoMAEConfig, VideoMAEForVideoClassification

SIDE, PATCH, FRAMES, TUBELET, BATCH = 16, 4, 8, 2, 32
DIRECTIONS = torch.tensor([(-1, 0), (1, 0), (0, -1), (0, 1)])
"""Up, down, left, right, as steps along rows and columns; 2 d and 2 d + 1 are opposites."""
CLASSES = 10 * len(DIRECTIONS)
NOISE, TEST_BATCHES = 0.05, 48


def config() -> PretrainedConfig:
    video = {"image_size": SIDE, "patch_size": PATCH, "num_frames": FRAMES, "tubelet_size": TUBELET, "num_channels": 1, "num_labels": CLASSES}
    return VideoMAEConfig(**SMALL, **video, num_hidden_layers=3)


def clips(scans: Tensor, directions: Tensor, starts: Tensor) -> Tensor:
    """Clips [B, FRAMES, SIDE, SIDE] of scans [B, 8, 8] whose corner is at starts [B, 2] in the first frame."""
    canvas = pad(scans, (0, SIDE - scans.shape[-1], 0, SIDE - scans.shape[-2]))
    corner = starts[:, None] + torch.arange(FRAMES)[:, None] * DIRECTIONS[directions][:, None]  # [B, FRAMES, 2]
    down, right = ((torch.arange(SIDE) - corner[..., None]) % SIDE).unbind(2)
    return canvas[torch.arange(len(scans))[:, None, None, None], down[..., :, None], right[..., None, :]]


def batches(split: Split, seed: int) -> Iterator[Batch]:
    random, (scans, digits) = random_stream(split, seed), split_digits(split, seed)
    for _ in batch_numbers(split, TEST_BATCHES):
        rows = torch.randint(len(digits), (BATCH,), generator=random)
        directions = torch.randint(len(DIRECTIONS), (BATCH,), generator=random)
        video = clips(scans[rows], directions, torch.randint(SIDE, (BATCH, 2), generator=random))
        video = 2 * (video + NOISE * torch.randn(video.shape, generator=random)) - 1
        yield {"pixel_values": video[:, :, None], "labels": digits[rows] * len(DIRECTIONS) + directions}


MOVING_DIGITS = Task("moving-digits", VideoMAEForVideoClassification, config, batches, steps=1200, learning_rate=2e-3)
