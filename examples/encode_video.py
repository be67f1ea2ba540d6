"""What compressed keys and values do to a video encoder, preset by preset.

    python examples/encode_video.py --model MCG-NJU/videomae-base-finetuned-kinetics --clips FOLDER
    python examples/encode_video.py

FOLDER has a folder of frames (image files, in the order of their names) for each clip, of as many frames as the model takes. Every second clip calibrates,
the others are compared with the uncompressed model. Without --clips: a camera that moves over two photographs that come with scikit-learn. Without --model: a
small VideoMAE of random weights, to see it run; its figures say nothing of a trained one. What is and isn't gained: docs/encoders.md
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoConfig, AutoImageProcessor, VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor

from spectralquant.errors import SpectralQuantError
from spectralquant.integrations import calibrate_videomae

SETTINGS: dict[str, dict[str, Any]] = {name: {"compression": name} for name in ("standard", "high", "max")} | {"8 bits": {"bits": 8}}
SIDE, STEP, FRAMES, MOVES, BATCH = 160, 80, 8, 10, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a video encoder")
    parser.add_argument("--clips", type=Path, metavar="FOLDER", help="of folders of frames")
    args = parser.parse_args(argv)
    try:
        model, processor = load(args.model) if args.model else random_videomae()
        clips = read(args.clips) if args.clips else moves()
        if len(clips) < 2:
            parser.error(f"--clips {args.clips}: it has {len(clips)} folders of frames, expected at least 2: some calibrate, others are compared")
        others = clips[1::2]
        batches = [processor(others[i : i + BATCH], return_tensors="pt") for i in range(0, len(others), BATCH)]
        for name, options in SETTINGS.items():
            engine = calibrate_videomae(model, processor, clips[::2], **options)
            print(f"{name:8}  {engine.compare(model, batches)}")
    except (SpectralQuantError, OSError) as error:
        print(f"encode_video: {error}", file=sys.stderr)
        return 2
    return 0


def load(name: str) -> tuple[Any, Any]:
    """A model of the class it was saved as, and its image processor."""
    architecture = getattr(transformers, AutoConfig.from_pretrained(name).architectures[0])
    return architecture.from_pretrained(name).eval(), AutoImageProcessor.from_pretrained(name)


def random_videomae() -> tuple[Any, Any]:
    """Heads of 64, random weights, eight frames of 64 x 64 pixels in tubelets of 2 x 16 x 16."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 256, "num_labels": 10}
    config = VideoMAEConfig(**shape, image_size=64, patch_size=16, num_frames=FRAMES, tubelet_size=2)
    return VideoMAEForVideoClassification(config).eval(), VideoMAEImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})


def read(folder: Path) -> list[list[Any]]:
    """Frames of each clip."""
    return [[Image.open(frame).convert("RGB") for frame in sorted(clip.iterdir())] for clip in sorted(folder.iterdir()) if clip.is_dir()]


def moves() -> list[list[Any]]:
    """Clips of a square that moves right over a photograph."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    starts = [(p, x, y) for p in photographs for y in range(0, p.height - SIDE, STEP) for x in range(0, p.width - SIDE - FRAMES * MOVES, STEP)]
    return [[p.crop((x + dx, y, x + dx + SIDE, y + SIDE)) for dx in range(0, FRAMES * MOVES, MOVES)] for p, x, y in starts]


if __name__ == "__main__":
    sys.exit(main())
