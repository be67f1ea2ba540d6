"""Adapter for EleutherAI's lm-evaluation-harness (0.4.9 or newer): its tasks on a compressed cache.

    python -m spectralquant.evaluation.lm_eval --model spectralquant --model_args pretrained=NAME,compression=high --tasks gsm8k

Importing this module registers the model; the command does that and hands over to the harness' own command line. Options of this package:
`calibration`, `compression` and `chunk`; all others are those of the harness' model "hf".

A prompt is always attended to uncoded, and the newest 128 to 255 tokens are exact, so a score that is read off one pass over a text would never
touch a code. Texts to score are therefore fed in short pieces through a cache. Texts of fewer than about 200 tokens are not coded even so: many
tasks without examples say nothing about a cache. The results file counts it, see `SpectralLM.get_model_info`.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from spectralquant.codec.layout import UNIT
from spectralquant.compat import cache_argument
from spectralquant.config import require_int
from spectralquant.engine import SpectralQuantEngine
from spectralquant.errors import ConfigError, SpectralQuantError

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as _error:
    raise ConfigError('the adapter needs the lm-evaluation-harness, which is not installed; run: pip install "spectralquant[lm-eval]"') from _error

_Base: Any = HFLM  # the decorator that registers it hides its type from type checkers


@register_model("spectralquant")
class SpectralLM(_Base):
    """The harness' HuggingFace model with this package's cache.

    Args:
        pretrained: Name, folder, or a loaded model.
        calibration: Calibration file of the model; None calibrates it with the bundled corpus.
        compression: Preset.
        chunk: Tokens fed at a time while scoring, 1 to 16; a longer piece would attend to itself uncoded.
        **options: Of `lm_eval.models.huggingface.HFLM`.

    Raises:
        ConfigError: `chunk` is out of its range, there is no such preset, or the model is no causal LM on one device.
        ProfileError: The calibration is missing, damaged, or of another model.
    """

    def __init__(self, pretrained: Any, calibration: str | None = None, compression: str = "high", chunk: int = 16, **options: Any) -> None:
        self.chunk: int = require_int("chunk", chunk, 1, 16)
        self.engine: SpectralQuantEngine = SpectralQuantEngine(compression=compression)
        if calibration is not None:
            self.engine.load_calibration(calibration)
        super().__init__(pretrained, **options)
        self._check_model()
        if calibration is None:
            self.engine.calibrate(self.model, self.tokenizer)
        self.engine.profile_of(self.model)  # another model's calibration is refused now, not at the first request
        self.sequences: int = 0
        self.coded_sequences: int = 0

    def _check_model(self) -> None:
        if self.backend != "causal":
            raise ConfigError(f"backend={self.backend!r}: expected a causal language model, this package has no cache for others")
        devices = {str(device) for device in getattr(self.model, "hf_device_map", {}).values()}
        if len(devices) > 1:
            raise ConfigError(f"the model is spread over {', '.join(sorted(devices))}: expected one device; leave parallelize and device_map out")

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocabulary] of ids [B, T], which may be padded on the right: no token attends to what follows it.

        `attn_mask` and `labels` are for encoder-decoder models, which are refused.
        """
        cache = self.engine.cache(self.model)
        with torch.no_grad(), torch.autocast(self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None):
            pieces = [self.model(input_ids=ids, use_cache=True, **cache_argument(self.model, cache)).logits for ids in inps.split(self.chunk, 1)]
        lengths = inps.shape[1] - (inps.flip(1) != 0).int().argmax(1)  # the harness pads with zeros
        self._count(lengths > self.engine.cache_config.window + UNIT)
        return torch.cat(pieces, 1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Ids [B, T + new] after ids [B, T], padded on the left; the cache learns of the padding from the attention mask, as in `engine.generate`."""
        cache = self.engine.cache(self.model)
        out = super()._model_generate(context, max_length, stop, **cache_argument(self.model, cache), **generation_kwargs)
        segments = [layer.segment for layer in cache.coded_layers if layer.segment is not None]
        self._count(segments[0].packed > segments[0].start)
        return out

    def _count(self, coded: Tensor) -> None:
        """`coded` [B] says which sequences had tokens in the packed store."""
        self.sequences += len(coded)
        self.coded_sequences += int(coded.sum())

    def get_model_info(self) -> dict[str, Any]:
        """The harness' own, and in the results under "spectralquant": the settings, how many sequences were run, and how many were long enough
        for codes to be read. The other scores are the uncompressed model's."""
        settings = {"compression": self.engine.preset.name, "chunk": self.chunk}
        return {**super().get_model_info(), "spectralquant": {**settings, "sequences": self.sequences, "coded_sequences": self.coded_sequences}}


def main() -> int:
    """The harness' command line; returns the exit status. Errors of this package are one line on stderr, not a traceback."""
    try:
        cli_evaluate()
    except SpectralQuantError as error:
        print(f"spectralquant: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
