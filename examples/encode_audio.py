"""What compressed keys and values do to an audio encoder, preset by preset.

    python examples/encode_audio.py --model openai/whisper-base --clips FOLDER
    python examples/encode_audio.py

FOLDER has WAV files (16 bits, one channel, the model's sampling rate). Every second clip calibrates, the others are compared with the uncompressed model; of
a model that also has a decoder, the encoder is. Without --clips: glides of tones in noise. Without --model: a small wav2vec2 of random weights, to see it
run; its figures say nothing of a trained one. What is and isn't gained: docs/encoders.md
"""

import argparse
import sys
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoFeatureExtractor, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from spectralquant.errors import SpectralQuantError
from spectralquant.integrations import calibrate_audio

SETTINGS: dict[str, dict[str, Any]] = {name: {"compression": name} for name in ("standard", "high", "max")} | {"8 bits": {"bits": 8}}
RATE, CLIPS, SECONDS = 16_000, 16, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of an audio encoder")
    parser.add_argument("--clips", type=Path, metavar="FOLDER", help="of WAV files")
    args = parser.parse_args(argv)
    try:
        model, extractor = load(args.model) if args.model else random_wav2vec2()
        rate = extractor.sampling_rate
        clips = read(args.clips, rate) if args.clips else glides()
        if len(clips) < 2:
            parser.error(f"--clips {args.clips}: it has {len(clips)} WAV files, expected at least 2: some calibrate, others are compared")
        batches = [extractor([clip], sampling_rate=rate, return_tensors="pt") for clip in clips[1::2]]
        for name, options in SETTINGS.items():
            engine = calibrate_audio(model, extractor, clips[::2], rate, **options)
            print(f"{name:8}  {engine.compare(model, batches)}")
    except (SpectralQuantError, OSError, ValueError) as error:
        print(f"encode_audio: {error}", file=sys.stderr)
        return 2
    return 0


def load(name: str) -> tuple[Any, Any]:
    """A model of the class it was saved as, or its encoder, and its feature extractor."""
    model = getattr(transformers, AutoConfig.from_pretrained(name).architectures[0]).from_pretrained(name).eval()
    return model.get_encoder() if model.config.is_encoder_decoder else model, AutoFeatureExtractor.from_pretrained(name)


def random_wav2vec2() -> tuple[Any, Any]:
    """Heads of 64 and random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 256, "conv_dim": (64,) * 7}
    return Wav2Vec2Model(Wav2Vec2Config(**shape, num_conv_pos_embedding_groups=4)).eval(), Wav2Vec2FeatureExtractor(sampling_rate=RATE)


def read(folder: Path, rate: int) -> list[np.ndarray]:
    """Clips [samples] in [-1, 1]. ValueError for a file of another form."""
    clips = []
    for path in sorted(folder.glob("*.wav")):
        with wave.open(str(path), "rb") as file:
            if (file.getsampwidth(), file.getnchannels(), file.getframerate()) != (2, 1, rate):
                form = f"{8 * file.getsampwidth()} bits, {file.getnchannels()} channels, {file.getframerate()} Hz"
                raise ValueError(f"--clips: {path.name} has {form}, expected 16 bits, 1 channel, {rate} Hz; convert it first")
            clips.append(np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32_768)
    return clips


def glides() -> list[np.ndarray]:
    """Tones whose frequency moves from one value to another, with noise."""
    random, t = np.random.default_rng(0), np.arange(SECONDS * RATE) / RATE
    ends = random.uniform(100, 4000, (CLIPS, 2))
    tones = [np.sin(2 * np.pi * (low * t + (high - low) * t**2 / (2 * SECONDS))) for low, high in ends]
    return [(tone + 0.1 * random.standard_normal(len(t))).astype(np.float32) for tone in tones]


if __name__ == "__main__":
    sys.exit(main())
