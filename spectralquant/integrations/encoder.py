"""Encoders whose attention is computed from coded keys and values: calibrated on the user's own inputs, applied to one model, taken off again.

An encoder keeps nothing between two calls, so no resident cache gets smaller here; docs/encoders.md says what is gained and what is not.
"""

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spectralquant.calibration.fit import fit_profile
from spectralquant.calibration.hf import TOKENS_PER_DIMENSION, ModelStatistics, unwrapped, weights_digest
from spectralquant.codec.budget import require_head_dim
from spectralquant.codec.codec import LayerCodec, build_codec, place_codecs
from spectralquant.config import Dials, require_int
from spectralquant.errors import CalibrationError, ConfigError, ProfileError, UnsupportedModelError
from spectralquant.integrations.adapters import ADAPTERS
from spectralquant.integrations.calls import AttentionAdapter, AttentionCall
from spectralquant.integrations.coded import coded_attention
from spectralquant.integrations.comparison import Comparison, compare_outputs, main_output
from spectralquant.integrations.inputs import Inputs, device_of, evaluating, run_model
from spectralquant.integrations.statistics import Recorder
from spectralquant.integrations.taps import Taps, tap, tapped
from spectralquant.presets import CompressionPreset, resolve_preset
from spectralquant.profile import Choices, LayerProfile, Profile, SideProfile, load_profile

CHOICES = Choices(
    run=0, trajectory=False, token_weights=False, planes_first=True, exact_below=0.0, exact_error=0.0, add_mass=False, key_gain="wide", value_gain="wide"
)
"""The plain frame, and no token kept for its error: tokens of an encoder are seen once. Tokens that stand apart get a gain that reaches them instead."""
WIDTHS = (2, 4, 6, 8)
LEAST_VARIANCE = 0.1
"""Of a coordinate under equal widths, as a share of the mean."""
_taps: WeakKeyDictionary[nn.Module, Taps] = WeakKeyDictionary()


class EncoderEngine:
    """Coded attention for one encoder: vision, video, protein, audio, or any module with an adapter.

    Args:
        compression: A preset, "high" by default.
        bits: 2, 4, 6 or 8 bits for every coordinate instead.
        exact_tokens: First tokens of every sequence that stay as they are; None: class and register tokens where the model has them.
        adapters: For attention modules that neither transformers' attention interface nor `ADAPTERS` serves.

    Raises:
        ConfigError: An argument is out of its range.
    """

    def __init__(
        self,
        compression: str | CompressionPreset = "high",
        *,
        bits: int | None = None,
        exact_tokens: int | None = None,
        adapters: Sequence[AttentionAdapter] = (),
    ) -> None:
        self.preset: CompressionPreset = resolve_preset(compression)
        if bits is not None and require_int("bits", bits, 2, 8) not in WIDTHS:
            raise ConfigError(f"bits={bits}: expected one of {WIDTHS}, or None for a preset")
        self.dials: Dials = Dials() if bits is None else Dials(avg_bits=bits, noise_bits=bits, value_noise_bits=bits)
        self.exact_tokens: int | None = None if exact_tokens is None else require_int("exact_tokens", exact_tokens, 0)
        self.adapters: tuple[AttentionAdapter, ...] = (*adapters, *ADAPTERS)
        self.profile: Profile | None = None

    def calibrate(self, model: nn.Module, inputs: Inputs) -> dict[str, Any]:
        """Measure the spectra of every attention module that `inputs` reach. The model is left as it was.

        Args:
            model: A model of transformers, or any module.
            inputs: The user's own, see `Inputs`. Tensors are moved to the model's device.

        Returns:
            {modules, tokens, head_dims}: how many modules and tokens, and their head sizes.

        Raises:
            ConfigError: An engine is applied to the model.
            UnsupportedModelError: No attention was seen, or a head size can't be coded.
            CalibrationError: `inputs` has nothing, or too few tokens.
        """
        model = _free(model)
        names = {module: name for name, module in model.named_modules()}
        recorder = Recorder(names)
        with evaluating(model), tapped(model, names, recorder, self.adapters):
            batches = sum(1 for _ in run_model(model, inputs))
        if not batches:
            raise CalibrationError("inputs has no batch; bring some that are like those the model will see")
        self.profile = self._fit(model, recorder)
        tokens = min(recorder.tokens.values())
        return {"modules": len(recorder.layers), "tokens": tokens, "head_dims": sorted({p.head_dim for p in self.profile.layers.values()})}

    def _fit(self, model: nn.Module, recorder: Recorder) -> Profile:
        if not recorder.layers:
            raise UnsupportedModelError(_NOTHING_SEEN.format(type(model).__name__))
        layers: dict[int, LayerProfile] = {}
        order = list(recorder.layers)
        for name, stats in recorder.layers.items():
            dim, tokens = stats.keys.mean.shape[-1], recorder.tokens[name]
            require_head_dim(dim)
            if tokens < TOKENS_PER_DIMENSION * dim:
                raise CalibrationError(f"{name} saw {tokens} tokens, expected at least {TOKENS_PER_DIMENSION * dim} for head size {dim}; bring more inputs")
            statistics = ModelStatistics({}, {0: stats}, tokens=tokens)
            if name in recorder.output_metric:
                statistics.output_metric[0] = recorder.output_metric[name]
            layers[order.index(name)] = fit_profile(statistics, CHOICES).layers[0]
        return Profile(layers, CHOICES, _fingerprint(model, order))

    def codecs(self, model: nn.Module) -> dict[str, LayerCodec]:
        """Name of an attention module -> its codec, on the model's device.

        Raises:
            CalibrationError: There is no calibration yet.
            ProfileError: It was made for another model.
        """
        if self.profile is None:
            raise CalibrationError("this engine has no calibration; call calibrate(model, inputs) or load(path) first")
        model, names = unwrapped(model), self.profile.model["modules"]
        self.profile.require_model(_fingerprint(model, names))
        if missing := sorted(set(names) - {name for name, _ in model.named_modules()}):
            raise ProfileError(f"this calibration is of modules that {type(model).__name__} doesn't have ({', '.join(missing)[:200]}); calibrate this model")
        modules = [model.get_submodule(name) for name in names]
        out: dict[str, LayerCodec] = {}
        devices = {i: device_of(module, model) for i, module in enumerate(modules)}
        profile = _for_fine_codes(self.profile) if self.dials.any_set else self.profile
        for dim in sorted({layer.head_dim for layer in profile.layers.values()}):
            layers = {i: layer for i, layer in profile.layers.items() if layer.head_dim == dim}
            built = build_codec(replace(profile, layers=layers), self.preset, self.dials, device_of(model), "uniform")
            out |= {names[i]: codec for i, codec in place_codecs(built, devices).items()}
        return out

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Let this model, and no other, attend to coded keys and values until `remove_from`. Returns it.

        Raises:
            ConfigError: An engine is applied to it already.
            CalibrationError, ProfileError: See `codecs`.
        """
        model = _free(model)
        exact = prefix_tokens(model) if self.exact_tokens is None else self.exact_tokens
        modules = {model.get_submodule(name): codec for name, codec in self.codecs(model).items()}

        def attend(module: nn.Module, call: AttentionCall) -> Tensor:
            return coded_attention(call, modules[module], exact)

        _taps[model] = tap(model, modules, attend, self.adapters)
        return model

    def remove_from(self, model: nn.Module) -> nn.Module:
        """Put the model back, whichever engine was applied. Returns it."""
        model = unwrapped(model)
        taps = _taps.pop(model, None)
        if taps is not None:
            taps.remove()
        return model

    @contextmanager
    def applied_to(self, model: nn.Module) -> Generator[nn.Module]:
        """`apply_to` for the length of a with block."""
        self.apply_to(model)
        try:
            yield model
        finally:
            self.remove_from(model)

    def compare(self, model: nn.Module, inputs: Inputs) -> Comparison:
        """Run the model on `inputs` twice, as it is and with coded keys and values, and compare its output. The model is left as it was.

        Args:
            model: The model that was calibrated.
            inputs: See `Inputs`; other ones than those of the calibration, to learn something. All outputs are kept until the end.

        Raises:
            ConfigError: An engine is applied to the model, `inputs` has nothing, or the model's output has no vectors.
            CalibrationError, ProfileError: See `codecs`.
        """
        model = _free(model)
        inputs = inputs if callable(inputs) else list(inputs)
        with evaluating(model):
            plain = [main_output(batch, out) for batch, out in run_model(model, inputs)]
            if not plain:
                raise ConfigError("inputs has no batch; bring at least one to compare outputs on")
            with self.applied_to(model):
                coded = (main_output(batch, out)[1] for batch, out in run_model(model, inputs))
                return compare_outputs(((want, got) for (_, want), got in zip(plain, coded, strict=True)), plain[0][0])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the calibration as one .safetensors file; returns its path."""
        if self.profile is None:
            raise CalibrationError("this engine has no calibration to save; call calibrate(model, inputs) first")
        return self.profile.save(path)

    def load(self, path: str | os.PathLike[str]) -> "EncoderEngine":
        """Read a calibration that `save` wrote. Returns the engine.

        Raises:
            ProfileError: The file is missing, damaged, of another version, or no encoder's.
        """
        self.profile = load_profile(path)
        self.profile.require_encoder()
        return self


_NOTHING_SEEN = (
    "no attention was seen in this {}. It has to attend by transformers' attention interface, or EncoderEngine(adapters=[...]) has to get an adapter for its "
    "attention modules that says where queries, keys, values, mask and scale are (spectralquant.integrations.AttentionAdapter, or ProjectionAdapter for "
    "modules of plain projections)"
)


def _for_fine_codes(profile: Profile) -> Profile:
    """`profile` for codes of equal width: where no coordinate has to go without bits, those that calibration saw little of may have some range."""

    def with_range(side: SideProfile) -> SideProfile:
        return replace(side, variance=torch.maximum(side.variance, LEAST_VARIANCE * side.variance.mean(-1, keepdim=True)))

    layers = {i: replace(layer, key=with_range(layer.key), value=with_range(layer.value)) for i, layer in profile.layers.items()}
    return replace(profile, layers=layers)


def prefix_tokens(model: nn.Module) -> int:
    """Class and register tokens in front of every sequence, by the names of the model's parameters and its configuration."""
    has_class = any(name.rpartition(".")[2] in ("cls_token", "class_embedding") for name, _ in model.named_parameters())
    return has_class + int(getattr(getattr(model, "config", None), "num_register_tokens", 0) or 0)


def _free(model: nn.Module) -> nn.Module:
    """`model` without wrappers; ConfigError if an engine is applied to it."""
    model = unwrapped(model)
    if model in _taps:
        raise ConfigError(f"an engine is applied to this {type(model).__name__} already; call remove_from(model) first")
    return model


def _fingerprint(model: nn.Module, names: list[str]) -> dict[str, Any]:
    return {"architecture": type(model).__name__, "modules": names, "weights": weights_digest(model)}
