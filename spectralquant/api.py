"""SpectralQuant: the one-object interface of the original package."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spectralquant.cache.hf import SpectralCache
from spectralquant.engine import SpectralQuantEngine
from spectralquant.errors import ShapeError
from spectralquant.memory import MemoryPlan
from spectralquant.prefix_store.store import PrefixStore


class SpectralQuant:
    """Compressed KV cache for any HuggingFace causal LM.

    Args:
        compression: "standard" (5.95x), "high" (6.55x), "max" (6.68x) or "ultra" (8x), or a `CompressionPreset`.
        device: Informative; models are used where they are.
        head_dim: Expected head size; None accepts the model's.
        avg_bits, noise_bits, value_noise_bits, d_eff_variance: Dials that replace the preset's allocation (see `config.Dials`).
        use_qjl: Must be False.
        quantizer: "joint", "uniform" or "lloyd-max" (see `SpectralQuantEngine`).
        calibration_cache: Keep calibrations on this machine, so that the same one is not measured twice.

    Example:
        >>> sq = SpectralQuant(compression="high")
        >>> sq.calibrate(model, tokenizer)
        >>> sq.generate(model, tokenizer, "Once upon a time", max_new_tokens=64)["text"]
    """

    def __init__(
        self,
        *,
        compression: str = "high",
        device: str | None = None,
        head_dim: int | None = None,
        avg_bits: int | None = None,
        noise_bits: int | None = None,
        value_noise_bits: int | None = None,
        d_eff_variance: float | None = None,
        use_qjl: bool = False,
        quantizer: str = "joint",
        calibration_cache: bool = True,
    ) -> None:
        self._engine = SpectralQuantEngine(
            head_dim,
            avg_bits,
            use_qjl=use_qjl,
            d_eff_variance=d_eff_variance,
            noise_bits=noise_bits,
            value_noise_bits=value_noise_bits,
            device=device,
            compression=compression,
            quantizer=quantizer,
            calibration_cache=calibration_cache,
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **settings: Any) -> "SpectralQuant":
        """An object with the calibration of a folder that `save_pretrained` wrote, or of a model's folder that holds one; `settings` as of the constructor.

        Raises:
            ProfileError: There is none, or it is damaged.
        """
        made = cls(**settings)
        made.load_calibration(folder)
        return made

    @property
    def preset_name(self) -> str:
        return self._engine.preset.name

    @property
    def expected_ratio(self) -> float:
        """FP16 bytes / packed bytes that the preset promises for the packed history."""
        return self._engine.preset.ratio

    @property
    def device(self) -> str | None:
        return self._engine.device

    @property
    def engine(self) -> SpectralQuantEngine:
        return self._engine

    def calibrate(
        self, model: PreTrainedModel, tokenizer: Any, calibration_texts: list[str] | None = None, n_samples: int | None = None, *, progress: bool = True
    ) -> dict[str, Any]:
        """See `SpectralQuantEngine.calibrate`."""
        return self._engine.calibrate(model, tokenizer, calibration_texts, n_samples, progress=progress)

    def generate(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        prompt: Any,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        add_special_tokens: bool = True,
        **generation: Any,
    ) -> dict[str, Any]:
        """See `SpectralQuantEngine.generate`; every further option goes to transformers' `generate`."""
        sampling = {"temperature": temperature, "top_p": top_p} if do_sample else {}
        options: dict[str, Any] = {"do_sample": do_sample, "repetition_penalty": repetition_penalty, **sampling, **generation}
        return self._engine.generate(model, tokenizer, prompt, max_new_tokens, add_special_tokens=add_special_tokens, **options)

    def compress_prefill(
        self, model: PreTrainedModel, tokenizer: Any, prompt: Any, *, add_special_tokens: bool = True, store: PrefixStore | None = None
    ) -> dict[str, Any]:
        """See `SpectralQuantEngine.compress_prefill`."""
        return self._engine.compress_prefill(model, tokenizer, prompt, add_special_tokens=add_special_tokens, store=store)

    def memory_plan(self, model: PreTrainedModel, batch: int, context: int, new_tokens: int = 0, *, prefill_chunk_size: int | None = None) -> MemoryPlan:
        """See `SpectralQuantEngine.memory_plan`."""
        return self._engine.memory_plan(model, batch, context, new_tokens, prefill_chunk_size=prefill_chunk_size)

    def cache(self, model: PreTrainedModel) -> SpectralCache:
        """See `SpectralQuantEngine.cache`."""
        return self._engine.cache(model)

    def compression_stats(self) -> dict[str, Any]:
        """See `SpectralQuantEngine.compression_stats`."""
        return self._engine.compression_stats()

    def save_calibration(self, path: str | os.PathLike[str]) -> Path:
        """See `SpectralQuantEngine.save_calibration`."""
        return self._engine.save_calibration(path)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """See `SpectralQuantEngine.save_pretrained`."""
        return self._engine.save_pretrained(folder)

    def load_calibration(self, path: str | os.PathLike[str], head_dim: int | None = None) -> None:
        """See `SpectralQuantEngine.load_calibration`; `head_dim`, when given, must be that of the file.

        Raises:
            ShapeError: The file's head size is not `head_dim`.
        """
        profile = self._engine.load_calibration(path)
        got = next(iter(profile.layers.values())).head_dim
        if head_dim is not None and head_dim != got:
            raise ShapeError(f"head_dim={head_dim} was asked for, {path} has heads of size {got}; leave head_dim out")
