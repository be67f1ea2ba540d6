"""What compressed keys and values do to a vision encoder, preset by preset.

    python examples/encode_images.py --model google/vit-base-patch16-224 --images FOLDER
    python examples/encode_images.py

Every second image calibrates, the others are compared with the uncompressed model. Without --images: crops of two photographs that come with scikit-learn.
Without --model: a small ViT of random weights, to see it run; its figures say nothing of a trained one. What is and isn't gained: docs/encoders.md
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
from transformers import AutoConfig, AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from spectralquant.errors import SpectralQuantError
from spectralquant.integrations import calibrate_vit

SETTINGS: dict[str, dict[str, Any]] = {name: {"compression": name} for name in ("standard", "high", "max")} | {"8 bits": {"bits": 8}}
SIDE, STEP, BATCH = 160, 80, 8


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a vision encoder")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of image files")
    args = parser.parse_args(argv)
    try:
        model, processor = load(args.model) if args.model else random_vit()
        images = read(args.images) if args.images else crops()
        if len(images) < 2:
            parser.error(f"--images {args.images}: it has {len(images)} images (.jpg, .jpeg, .png), expected at least 2: some calibrate, others are compared")
        others = images[1::2]
        batches = [processor(images=others[i : i + BATCH], return_tensors="pt") for i in range(0, len(others), BATCH)]
        for name, options in SETTINGS.items():
            engine = calibrate_vit(model, processor, images[::2], **options)
            print(f"{name:8}  {engine.compare(model, batches)}")
    except (SpectralQuantError, OSError) as error:
        print(f"encode_images: {error}", file=sys.stderr)
        return 2
    return 0


def load(name: str) -> tuple[Any, Any]:
    """A model of the class it was saved as, and its image processor."""
    architecture = getattr(transformers, AutoConfig.from_pretrained(name).architectures[0])
    return architecture.from_pretrained(name).eval(), AutoImageProcessor.from_pretrained(name)


def random_vit() -> tuple[Any, Any]:
    """Heads of 64, random weights, photographs of 64 x 64 pixels in patches of 8."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, intermediate_size=256, image_size=64, patch_size=8, num_labels=10)
    return ViTForImageClassification(config).eval(), ViTImageProcessor(size={"height": 64, "width": 64})


def read(folder: Path) -> list[Any]:
    """The folder's images, by name."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]


def crops() -> list[Any]:
    """Squares of the sample photographs that overlap by half."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [p.crop((x, y, x + SIDE, y + SIDE)) for p in photographs for y in range(0, p.height - SIDE, STEP) for x in range(0, p.width - SIDE, STEP)]


if __name__ == "__main__":
    sys.exit(main())
