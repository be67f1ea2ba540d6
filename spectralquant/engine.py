"""SpectralQuantEngine: one object that calibrates models, applies compressed attention to them and makes their caches.

An engine keeps one calibration per model, told apart by the model's fingerprint; nothing is lost when a second model comes.
"""

import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from spectralquant import application, prompts
from spectralquant.archive.predictor import ArchiveModel
from spectralquant.attention.hf import register
from spectralquant.cache.file import Identity, dtype_name
from spectralquant.cache.hf import SpectralCache, coded_layer_indices, kv_size, layer_devices, model_device, read_dense
from spectralquant.cache_figures import cache_figures, calibration_figures, how_decoded
from spectralquant.calibration.hf import collect, fingerprint, known_fingerprint, unwrapped, weights_digest
from spectralquant.calibration_cache import digest_of, remembered
from spectralquant.clock import GenerationClock
from spectralquant.codec.budget import require_head_dim
from spectralquant.codec.codec import LayerCodec, build_codec, place_codecs
from spectralquant.codec.identity import codec_identity
from spectralquant.codec.quantizer import QUANTIZERS
from spectralquant.cold.fit import FIT_TOKENS, fit
from spectralquant.cold.prefix import archive_prefix, load_archived
from spectralquant.compat import cache_argument, last_logits
from spectralquant.config import CacheConfig, Dials, require_int
from spectralquant.corpus import Samples, make_samples, token_budget
from spectralquant.errors import CalibrationError, ConfigError, ShapeError, UnsupportedModelError
from spectralquant.generation_options import prefill_piece, sequences_each
from spectralquant.memory import ForwardCost, MemoryPlan, Planner, bounded_memory, measure_forward
from spectralquant.original_format import load_original, original_pair
from spectralquant.prefix_store.store import PrefixStore
from spectralquant.prefix_store.use import StoreUse
from spectralquant.presets import CompressionPreset, resolve_preset
from spectralquant.pretrained import calibration_file, find_beside, save_folder
from spectralquant.profile import Profile, load_profile
from spectralquant.selection import choose
from spectralquant.spectra import spectrum_summary

UNNAMED = ""
"""Key of a calibration that does not say for which model it was made."""

_lock = threading.RLock()
"""Held while an engine learns something: threads that share one wait instead of calibrating or training twice."""


class SpectralQuantEngine:
    """Explicit control over calibration, caches and attention.

    Args:
        head_dim: Expected head size; None accepts the model's. A model with another one is refused.
        total_bits: Mean bits of the semantic band (the original's dial); None leaves it to the preset.
        use_water_fill: Must be True: it is how this codec allocates bits.
        use_qjl: Must be False: a sign-sketch stage costs bits and raises the error (see docs/maths.md).
        d_eff_variance, noise_bits, value_noise_bits: Dials, see `config.Dials`.
        device: Where models are expected; None takes each model as it is.
        compression: Preset whose size promise is kept when no dial is set.
        cache_config: What caches keep exact.
        quantizer: "joint" (V in jointly quantized blocks, the least error), "uniform" (scalar, encodes faster) or "lloyd-max" (scalar, read by the
            PyTorch reference only); see `codec.quantizer`.
        calibration_cache: Keep calibrations on this machine, so that the same one is not measured twice, see `calibration_cache`.

    Raises:
        ConfigError: An argument is out of its range.
    """

    def __init__(
        self,
        head_dim: int | None = None,
        total_bits: int | None = None,
        use_water_fill: bool = True,
        use_qjl: bool = False,
        d_eff_variance: float | None = None,
        noise_bits: int | None = None,
        value_noise_bits: int | None = None,
        device: str | None = None,
        *,
        compression: str | CompressionPreset = "high",
        cache_config: CacheConfig | None = None,
        quantizer: str = "joint",
        calibration_cache: bool = True,
    ) -> None:
        if use_qjl:
            raise ConfigError("use_qjl=True: a QJL stage is not offered, it costs bits and raises the error; leave it False")
        if not use_water_fill:
            raise ConfigError("use_water_fill=False: bits are always allocated by water-filling; leave it True")
        self.head_dim: int | None = None if head_dim is None else require_int("head_dim", head_dim, 1)
        self.preset: CompressionPreset = resolve_preset(compression)
        self.dials: Dials = Dials(total_bits, noise_bits, value_noise_bits, d_eff_variance)
        self.device = device
        self.cache_config: CacheConfig = cache_config or CacheConfig()
        if quantizer not in QUANTIZERS:
            raise ConfigError(f"quantizer={quantizer!r}: expected one of {', '.join(map(repr, QUANTIZERS))}")
        self.quantizer = quantizer
        self.calibration_cache = calibration_cache
        self._profiles: dict[str, Profile] = {}
        self._codecs: dict[tuple[str, str], dict[int, LayerCodec]] = {}
        self._identities: dict[str, str] = {}
        self._latest: str | None = None
        self._last_stats: dict[str, Any] = {}
        self._forward_costs: dict[str, ForwardCost] = {}

    @classmethod
    def of(cls, profile: Profile, **settings: Any) -> "SpectralQuantEngine":
        """An engine that holds `profile` from the beginning: one calibration serves every preset. `settings` as of the constructor."""
        made = cls(**settings)
        made.add_calibration(profile)
        return made

    # Calibration ----------------------------------------------------------------------------------------------------

    def calibrate(
        self, model: PreTrainedModel, tokenizer: Any, calibration_texts: list[str] | None = None, n_samples: int | None = None, *, progress: bool = True
    ) -> dict[str, Any]:
        """Measure a model's spectra and choose its codec by measured KL. The model is left exactly as it was.

        The same call on the same model loads what was measured before, unless the engine was made with `calibration_cache=False`.

        Args:
            model, tokenizer: A causal LM of transformers and its tokenizer.
            calibration_texts: Texts, mixed kinds and long ones best; None for the bundled corpus.
            n_samples: Use so many texts.
            progress: Show a progress bar.

        Returns:
            {calibrated, n_heads, d_eff_mean, d_eff_min, d_eff_max, gap_mean, gap_median, calibration_time_s, tokens, certificate, loaded_from}; the last is the
            kept file, None where it was measured now.
        """
        began, model = time.perf_counter(), unwrapped(model)
        self._check_model(model)
        samples = make_samples(tokenizer, calibration_texts, n_samples, token_budget(model.device))
        corpus = "bundled" if calibration_texts is None else "own"
        if self.calibration_cache:
            digest = digest_of(fingerprint(model), samples, self._decisive(model, corpus))
            profile, file = remembered(digest, lambda: self._measure(model, samples, corpus, progress))
        else:
            profile, file = self._measure(model, samples, corpus, progress), None
        self.add_calibration(profile)
        return {
            "calibrated": True,
            **spectrum_summary(profile, self.preset),
            "calibration_time_s": time.perf_counter() - began,
            "tokens": profile.certificate.get("tokens", 0),
            "certificate": profile.certificate,
            "loaded_from": None if file is None else str(file),
        }

    def _measure(self, model: PreTrainedModel, samples: Samples, corpus: str, progress: bool) -> Profile:
        began = time.perf_counter()
        register()  # soft-caps are ours to apply: transformers' sdpa refuses or drops them
        with tqdm(total=samples.tokens, unit="tok", desc="calibrating", disable=not progress) as bar:
            statistics = collect(model, samples.statistics, coded_layer_indices(model), _advance(bar))
            bar.set_description("choosing")
            with self.applied_to(model), _evaluation_mode(model):
                profile = choose(model, statistics, samples.held_out, self.preset, self.cache_config, self.quantizer, bar.set_postfix_str)
        profile.certificate.update(tokens=statistics.tokens, seconds=round(time.perf_counter() - began, 2), corpus=corpus)
        return profile

    def _decisive(self, model: PreTrainedModel, corpus: str) -> dict[str, Any]:
        """What decides a calibration besides fingerprint and tokens. Values too: models may differ in scales alone, which leave the fingerprint as it is."""
        settings = {"preset": self.preset, "cache": self.cache_config, "quantizer": self.quantizer, "dtype": model.dtype, "device": model.device.type}
        return {**{name: str(value) for name, value in settings.items()}, "corpus": corpus, "values": weights_digest(model, signs_only=False)}

    def ensure_calibrated(self, model: PreTrainedModel, tokenizer: Any, *, progress: bool = True) -> Path | None:
        """Take the calibration that lies beside the model (see `save_pretrained`), else `calibrate` with the bundled corpus; nothing where this engine has one.

        Returns:
            The file that was loaded, or None.
        """
        with _lock:
            if self.is_calibrated(model):
                return None
            if (found := find_beside(unwrapped(model), known_fingerprint(model))) is not None:
                self.add_calibration(found[1])
                return found[0]
            kept = self.calibrate(model, tokenizer, progress=progress)["loaded_from"]
            return None if kept is None else Path(kept)

    def save_calibration(self, path: str | os.PathLike[str], model: PreTrainedModel | None = None) -> Path:
        """Write the calibration of `model` (default: the latest one) to one `.safetensors` file; returns its path."""
        return self._profile(model).save(path)

    def save_pretrained(self, folder: str | os.PathLike[str], model: PreTrainedModel | None = None) -> Path:
        """Write the calibration of `model` (default: the latest one) and a card of what was measured into a folder; returns it.

        In the folder of a saved model, under the name "spectralquant", it is found by itself by every `generate` of this package.

        Raises:
            ConfigError: The folder holds a README that is no such card.
        """
        return save_folder(self._profile(model), Path(folder))

    def load_calibration(self, path: str | os.PathLike[str]) -> Profile:
        """Read a calibration, a file or a folder of `save_pretrained`, and keep it beside the others; it is used for the model it was made for.

        The original package's pair PATH.pt and PATH_meta.json is read as well, with a warning that says what such a file lacks. It names
        no model, so it is used for any model without a calibration of its own whose shapes fit.

        Raises:
            ProfileError: The file is missing, damaged, or of another format version.
        """
        old = original_pair(Path(path))
        file = calibration_file(Path(path))
        profile = load_original(Path(path)) if not file.is_file() and any(p.is_file() for p in old) else load_profile(file)
        self.add_calibration(profile)
        return profile

    def calibrate_to(self, path: str | os.PathLike[str], model: PreTrainedModel, tokenizer: Any, **options: Any) -> Path:
        """`calibrate`, then `save_calibration`."""
        self.calibrate(model, tokenizer, **options)
        return self.save_calibration(path, model)

    def profile_of(self, model: PreTrainedModel) -> Profile:
        """The calibration that is used for `model`.

        Raises:
            CalibrationError: There is none yet.
            ProfileError: This engine's calibrations were made for other models.
        """
        return self._profile(model)

    def add_calibration(self, profile: Profile) -> None:
        """Keep a calibration beside the others, for the model it was made for."""
        key = profile.model.get("weights", UNNAMED)
        self._profiles[key], self._latest = profile, key
        self._codecs = {k: v for k, v in self._codecs.items() if k[0] != key}
        self._identities.pop(key, None)

    def _check_model(self, model: PreTrainedModel) -> None:
        """Raise what speaks against `model`, as far as its configuration tells."""
        for index in coded_layer_indices(model):
            _, dim = kv_size(model.config, index)
            if self.head_dim is not None and self.head_dim != dim:
                raise ShapeError(f"head_dim={self.head_dim} was asked for, the model's heads have {dim}; leave head_dim out")
            try:
                require_head_dim(dim)
            except ShapeError as error:
                raise UnsupportedModelError(f"layer {index} of {type(model).__name__}: {error}") from error

    def _profile(self, model: PreTrainedModel | None = None) -> Profile:
        if self._latest is None:
            raise CalibrationError("there is no calibration yet: call calibrate(model, tokenizer) or load_calibration(path) first")
        if model is None:
            return self._profiles[self._latest]
        known = known_fingerprint(model)
        profile = self._profiles.get(known["weights"]) or self._profiles.get(UNNAMED) or self._profiles[self._latest]
        profile.require_model(known)
        return profile

    def is_calibrated(self, model: PreTrainedModel) -> bool:
        """Whether this engine holds a calibration of `model`."""
        return known_fingerprint(model)["weights"] in self._profiles or UNNAMED in self._profiles

    # Caches and attention -------------------------------------------------------------------------------------------

    def apply_to(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make `model` read packed caches directly, until `remove_from`. Other models, and its own dense caches, are not touched."""
        application.apply(model)
        return model

    def remove_from(self, model: PreTrainedModel) -> PreTrainedModel:
        """Undo `apply_to`."""
        application.remove(model)
        return model

    @contextmanager
    def applied_to(self, model: PreTrainedModel) -> Generator[PreTrainedModel]:
        """`apply_to` for the length of a with block (no effect at its end if it was applied before, or another thread is inside such a block)."""
        with application.applied(model):
            yield model

    def cache(self, model: PreTrainedModel) -> SpectralCache:
        """An empty cache for `model.generate(..., past_key_values=cache)`; applies the engine to the model.

        Python looks `model.generate` up before it makes the arguments. So where nothing has applied the engine before, `generate` with a call of `cache` among
        its arguments is still the model's own: right, but without CUDA graphs, and codes don't know of left padding. Call `apply_to` or `cache` before it.
        """
        self.apply_to(model)
        codecs = self.profile_codec(model)
        identity = Identity(known_fingerprint(model)["weights"], dtype_name(model.dtype), self._codec_identity(model))
        return SpectralCache(model.config, codecs, self.cache_config, identity, layer_devices(model))

    def profile_codec(self, model: PreTrainedModel | None = None) -> dict[int, LayerCodec]:
        """Layer index -> codec at this engine's preset and dials, where the layer runs (without a model: the latest calibration's, on the CPU)."""
        profile = self._profile(model)
        device = torch.device("cpu") if model is None else model_device(model)
        devices = {} if model is None else layer_devices(model)
        key = (profile.model.get("weights", UNNAMED), str([str(devices.get(i, device)) for i in profile.layers]))
        with _lock:
            if key in self._codecs:
                return self._codecs[key]
            with tqdm(total=1.0, desc="training codebooks", bar_format="{l_bar}{bar}| {elapsed}", delay=1.0, leave=False) as bar:
                built = build_codec(profile, self.preset, self.dials, device, self.quantizer, _advance_to(bar))
            self._codecs[key] = place_codecs(built, devices)
        return self._codecs[key]

    def _codec_identity(self, model: PreTrainedModel) -> str:
        """Of `profile_codec(model)`, which is made: it may have trained codebooks."""
        profile = self._profile(model)
        key = profile.model.get("weights", UNNAMED)
        if key not in self._identities:
            self._identities[key] = codec_identity(profile, self.preset, self.dials, self.quantizer)
        return self._identities[key]

    # Generation -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        model: Any,
        tokenizer: Any,
        prompt: Any,
        max_new_tokens: int = 200,
        *,
        add_special_tokens: bool = True,
        max_memory: int | str | None = None,
        store: PrefixStore | None = None,
        **generation: Any,
    ) -> dict[str, Any]:
        """Generate from a compressed cache.

        Args:
            model, tokenizer: Calibrated on first use with the bundled corpus when this engine holds no calibration at all.
            prompt: A string, a list of strings (a left-padded batch), chat messages ([{"role":, "content":}, ...]), or token ids.
            max_new_tokens: 0 returns the prompt and no token.
            add_special_tokens: As in the tokenizer, for strings.
            max_memory: Bytes that the cache may take ("12GB"), checked for the longest that the generation may become before anything is allocated.
            store: What it has of the prompt is loaded instead of computed, and prompt and answer are stored; one prompt at a time.
            **generation: Any option of transformers' `generate`, `streamer` and `generation_config` included; `prefill_chunk_size` bounds the memory that
                a long prompt takes in the forward pass.

        Returns:
            {text, tokens, stats}: the new text and token ids (lists when `prompt` is a batch), and what was measured. `seconds` counts everything and
            is the sum of `prefill_seconds`, `compress_seconds` (packing, of the prompt and of blocks that leave the window later) and `decode_seconds`.
            With a store, `store` says what was found in it and what that saved, see `prefix_store.use.StoreUse.stats`.
            `decode_mode` says how steps ran ("CUDA graph", "compiled CUDA graph", "as it is"), `decode_reason` why they did not run as graphs.

        Raises:
            MemoryLimitError: The cache would take more than `max_memory`, or the device's memory has run out.
        """
        count = require_int("max_new_tokens", max_new_tokens, 0)
        inputs = prompts.encode(tokenizer, prompt, add_special_tokens, model_device(model))
        if self._latest is None:
            self.ensure_calibrated(model, tokenizer)
        rows = len(inputs.ids) * sequences_each(model, generation)
        with bounded_memory(self._planner(model), rows, inputs.ids.shape[1], count, max_memory), self.applied_to(model):
            cache = self.cache(model)
            use = None if store is None else StoreUse(store, cache, inputs.ids)
            sequences, clock = inputs.ids, GenerationClock(cache, model_device(model))
            if count:
                if use is not None:
                    use.read_prompt(model, rows, prefill_piece(model, generation))
                    generation["prefill_chunk_size"] = None  # one token is left
                generation = clock.watched(prompts.with_pad_token(model, tokenizer, generation))
                out = model.generate(input_ids=inputs.ids, attention_mask=inputs.mask, max_new_tokens=count, **cache_argument(model, cache), **generation)
                sequences = getattr(out, "sequences", out)
            times = clock.stop()
            if use is not None and count:
                use.end(sequences)
        new = sequences[:, inputs.ids.shape[1] :]
        tokens = [prompts.strip_padding(row, tokenizer) for row in new]
        texts = [tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
        made = sum(len(t) for t in tokens)
        stats = self._last_stats = {**cache_figures(cache, self.preset, made, times.seconds), **times.stats(made - len(tokens)), **how_decoded(cache)}
        if use is not None:
            stats["store"] = use.stats()
        batch = inputs.batched or len(texts) > 1
        return {"text": texts if batch else texts[0], "tokens": tokens if batch else tokens[0], "stats": stats}

    def memory_plan(self, model: PreTrainedModel, batch: int, context: int, new_tokens: int = 0, *, prefill_chunk_size: int | None = None) -> MemoryPlan:
        """Bytes that a generation takes, part by part, before it is begun.

        On an NVIDIA GPU `total` is what `torch.cuda.max_memory_allocated` will show. For that the model reads two short prompts, once.

        Args:
            model: Calibrated.
            batch: Sequences: prompts times beams or samples of each.
            context: Tokens of the longest prompt.
            new_tokens: Tokens generated behind it.
            prefill_chunk_size: As in transformers' `generate`: tokens of each prompt that go through the model at a time.
        """
        batch, context = require_int("batch", batch, 1), require_int("context", context, 1)
        new_tokens = require_int("new_tokens", new_tokens, 0)
        piece = None if prefill_chunk_size is None else require_int("prefill_chunk_size", prefill_chunk_size, 1)
        weights = known_fingerprint(model)["weights"]
        if weights not in self._forward_costs:
            with self.applied_to(model):
                self._forward_costs[weights] = measure_forward(model, lambda: self.cache(model))
        return self._planner(model).plan(batch, context, new_tokens, self._forward_costs[weights], piece)

    def _planner(self, model: PreTrainedModel) -> Planner:
        shares = {i: layer.exact_share for i, layer in self._profile(model).layers.items()}
        return Planner.of(model, self.profile_codec(model), shares, self.cache_config)

    def compress_prefill(
        self, model: PreTrainedModel, tokenizer: Any, prompt: Any, *, add_special_tokens: bool = True, store: PrefixStore | None = None
    ) -> dict[str, Any]:
        """Run a prompt once and keep its compressed cache for any number of follow-ups; with a `store`, once for all processes.

        `model.generate(**tokenizer(question), past_key_values=result["cache"])` continues it, given only the new tokens or the whole text,
        and works on a copy: every follow-up sees the same prefix. The engine stays applied to the model.

        Returns:
            {input_ids [1, T], logits [1, vocabulary] of the last position, next_token, cache, prompt_length, stats}
        """
        inputs = prompts.encode(tokenizer, prompt, add_special_tokens, model_device(model))
        if len(inputs.ids) != 1:
            raise ConfigError(f"prompt holds {len(inputs.ids)} sequences; compress_prefill takes one")
        if self._latest is None:
            self.ensure_calibrated(model, tokenizer)
        began = time.perf_counter()
        cache = self.cache(model)
        use = None if store is None else StoreUse(store, cache, inputs.ids)
        if use is not None:
            use.read_prompt(model)
        rest = inputs.ids[:, cache.get_seq_length() :]
        with torch.no_grad():
            logits = model(input_ids=rest, use_cache=True, **cache_argument(model, cache), **last_logits(model)).logits[:, -1]
        cache.prefix_ids = inputs.ids
        stats = self._last_stats = cache_figures(cache, self.preset, 0, time.perf_counter() - began)
        if use is not None:
            use.end(inputs.ids)
            stats["store"] = use.stats()
        return {
            "input_ids": inputs.ids,
            "logits": logits,
            "next_token": int(logits.argmax(-1)),
            "cache": cache,
            "prompt_length": inputs.ids.shape[1],
            "stats": stats,
        }

    prefill_compress = compress_prefill
    generate_compressed = generate

    def collect_kv(self, model: PreTrainedModel, tokenizer: Any, prompt: Any) -> DynamicCache:
        """The uncompressed cache of a prompt."""
        inputs = prompts.encode(tokenizer, prompt, True, model_device(model))
        return read_dense(model, inputs.ids, inputs.mask)

    def compress_kv_cache(self, past_key_values: DynamicCache, model: PreTrainedModel) -> SpectralCache:
        """A compressed copy of an uncompressed cache of `model`."""
        cache = self.cache(model)
        cache.fill(past_key_values)
        return cache

    # Archives -------------------------------------------------------------------------------------------------------

    def fit_archive(self, model: PreTrainedModel, tokenizer: Any, calibration_texts: list[str] | None = None, *, progress: bool = True) -> ArchiveModel:
        """What archives of a model's prefixes are written and read with, measured over the bundled corpus or own texts, once: it serves every preset. Keep it
        with its `save`, beside the calibration; `archive.predictor.load_archive` reads it.

        Raises:
            CalibrationError: The texts are too short, or the model's logits are not finite.
        """
        model = unwrapped(model)
        if self._latest is None:
            self.ensure_calibrated(model, tokenizer, progress=progress)
        samples = make_samples(tokenizer, calibration_texts, max_tokens=FIT_TOKENS)
        with self.applied_to(model), _evaluation_mode(model):
            return fit(model, self._profile(model), samples, progress=progress).archive

    def archive_prefix(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        prompt: Any,
        path: str | os.PathLike[str],
        archive: ArchiveModel,
        rate: int = -4,
        *,
        add_special_tokens: bool = True,
    ) -> dict[str, Any]:
        """Read a prompt once and write an archive of it, a twelfth of a 16-bit cache at the default `rate`, for `load_archived`.

        Args:
            model, tokenizer: No calibration is needed.
            prompt: One, in any form that `generate` takes.
            path: The file; the suffix is added if it is missing. The old one stays until the new one is whole.
            archive: From `fit_archive`.
            rate: Smaller and coarser (up to 64) or larger and finer (down to -64), see docs/archive.md.
            add_special_tokens: As in the tokenizer, for strings.

        Returns:
            {path, tokens, bytes, ratio, seconds}: bytes of the file, and how many times smaller than all that the model keeps, in 16 bits.

        Raises:
            ConfigError: `archive` is of another model, `rate` is out of range, or there are several prompts.
            UnsupportedModelError: The model has layers of a kind that can't be saved.
            OSError: The file can't be written.
        """
        inputs = prompts.encode(tokenizer, prompt, add_special_tokens, model_device(model))
        if len(inputs.ids) != 1:
            raise ConfigError(f"prompt holds {len(inputs.ids)} sequences; archive_prefix takes one")
        with self.applied_to(model):
            return archive_prefix(model, inputs.ids, Path(path), archive, rate)

    def load_archived(self, path: str | os.PathLike[str], model: PreTrainedModel, archive: ArchiveModel) -> SpectralCache:
        """A cache with the prefix that `archive_prefix` has put away, packed at this engine's preset, for any number of follow-ups (as of `compress_prefill`).

        Raises:
            CacheFileError: The file is missing, damaged, of another version, or made with another model or archive model.
            ConfigError: `archive` is of another model.
        """
        return load_archived(Path(path), model, archive, lambda: self.cache(model))

    # Figures --------------------------------------------------------------------------------------------------------

    def compression_stats(self, past_key_values: SpectralCache | None = None) -> dict[str, Any]:
        """Before calibration {preset, expected_ratio, calibrated: False}; after: bytes per token and the figures of the last run or cache."""
        base = {"preset": self.preset.name, "expected_ratio": self.preset.ratio}
        if self._latest is None:
            return {**base, "calibrated": False}
        layout = next(iter(self.profile_codec().values())).layout
        live = self._last_stats if past_key_values is None else cache_figures(past_key_values, self.preset, 0, 0.0)
        return {**base, "calibrated": True, **calibration_figures(self._profile(), layout, self.preset), **live}


def _advance(bar: Any) -> Callable[[int], None]:
    def advance(tokens: int) -> None:
        bar.update(tokens)

    return advance


def _advance_to(bar: Any) -> Callable[[float], None]:
    def advance(share: float) -> None:
        bar.update(share - bar.n)

    return advance


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Generator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
