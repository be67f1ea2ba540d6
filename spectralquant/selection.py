"""Choosing among codecs by what they do to the model: KL on windows kept out of the statistics.

The best recipe differs between models (a query metric helps one and hurts another), so the menu is measured, not argued about. The search
starts from the recipe that is best on most models and tries one change after another, keeping each that lowers the
score by more than 5 %. The score is (mean sqrt KL(uncompressed || compressed))^2 over the scored tokens: a few tokens carry most of the plain mean,
so on some hundred tokens that ranks candidates by luck, while the root still counts a bad token for more than a good one. Prefixes are run once; a candidate
costs one encoding and one forward of the scored tokens, which read real packed codes through the real cache.

The KL of the winner is optimistic: it is the least of the menu on the very windows it was chosen on, these come from the same texts as the
statistics (other parts of them), and the scored tokens are fed at once, so none of them is coded. It ranks candidates; it is no benchmark.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from spectralquant.cache.hf import SpectralCache
from spectralquant.calibration.fit import fit_profile
from spectralquant.calibration.hf import ModelStatistics
from spectralquant.calibration.mass import Asked, QueryRecorder, missing_mass
from spectralquant.calibration.recording import recording
from spectralquant.codec.codec import build_codec
from spectralquant.codec.layout import UNIT
from spectralquant.codec.quantizer import EPS, scalar_of
from spectralquant.compat import cache_argument
from spectralquant.config import CacheConfig, Dials
from spectralquant.errors import CalibrationError, ConfigError, UnsupportedModelError
from spectralquant.presets import CompressionPreset
from spectralquant.profile import Choices, LayerProfile, Profile

SCORED_SHARE = 4
"""One token in so many of a held-out window is scored, the others are its context."""
GAIN_NEEDED = 0.95
"""Gains of 3 and 4 % on these windows were none on other text, one of 8 % was 17 to 20 % there (docs/evaluation.md)."""
CHANGES: tuple[dict[str, Any], ...] = (
    {"planes_first": True},
    {"exact_below": 0.0, "exact_error": 0.0},
    {"token_weights": False},
    {"value_shift": -0.25},
    {"query_metric": False},
    {"output_metric": False},
    {"run": 0},
)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out windows as one batch of W.

    Attributes:
        context: Uncompressed cache of their contexts.
        scored: [W, S], the tokens that follow.
        reference: [W, S, vocabulary] float32, log-probabilities of the uncompressed model.
        asked: Layer index -> some queries of the scored tokens.
    """

    context: DynamicCache
    scored: Tensor
    reference: Tensor
    asked: dict[int, Asked]


def choose(
    model: PreTrainedModel,
    statistics: ModelStatistics,
    held_out: list[Tensor],
    preset: CompressionPreset,
    config: CacheConfig,
    quantizer: str = "uniform",
    progress: Callable[[str], None] = lambda label: None,
) -> Profile:
    """The profile with the least score of the menu, its certificate filled in. The model must use our attention implementation.

    Candidates are ranked with scalar quantizers, whose codebooks need no training; under "joint" the winner is measured once more with its own.
    """
    scalar = scalar_of(quantizer)
    windows = prepare(model, held_out, statistics.layers)
    require_cached(model, statistics, windows.context)
    rows: list[dict[str, Any]] = []
    best, best_score = Choices(), float("inf")
    for change in ({}, *CHANGES):
        choices = replace(best, **change)
        if choices == best and rows:
            continue
        try:
            profile = with_measured(fit_profile(statistics, choices), windows, preset, config, scalar)
            result = measure(model, windows, profile, preset, config, scalar)
        except ConfigError:
            if not rows:
                raise
            continue  # the budget can't hold this candidate
        better = result["score"] < best_score * (GAIN_NEEDED if rows else 1.0)
        rows.append({"choices": asdict(choices), "changed": change, **result, "kept": better})
        progress(f"{'start' if not change else ' '.join(f'{k}={v}' for k, v in change.items())}: KL {result['kl']:.4f}")
        if better:
            best, best_score = choices, result["score"]
    winner = next((r for r in reversed(rows) if r["kept"]), None)
    if winner is None:
        raise CalibrationError(f"no candidate gave a finite KL (got {rows[0]['kl']}): the model's logits are not finite; try bfloat16 or float32")
    profile = with_measured(fit_profile(statistics, best), windows, preset, config, scalar)
    if quantizer != scalar:
        winner = measure(model, windows, profile, preset, config, quantizer, lambda share: progress(f"training codebooks: {share:.0%}"))
    profile.certificate.update(
        {
            "preset": preset.name,
            "quantizer": quantizer,
            "windows": len(windows.scored),
            "scored_tokens": windows.scored.numel(),
            "kl": winner["kl"],
            "agreement": winner["agreement"],
            "menu": rows,
        }
    )
    return profile


def require_cached(model: PreTrainedModel, statistics: ModelStatistics, context: DynamicCache) -> None:
    """Raise UnsupportedModelError unless the keys that layers cache are there, and of the shape of those that their attention reads."""
    for index, layer in statistics.layers.items():
        cached: Any = context.layers[index]
        if cached.keys is None:
            raise UnsupportedModelError(f"layer {index} of {type(model).__name__} does not use the cache that the model is given")
        held, read = cached.keys.shape[1::2], layer.keys.mean.shape
        if held != read:
            raise UnsupportedModelError(
                f"layer {index} of {type(model).__name__} caches {held[0]} heads of size {held[1]} and attends to {read[0]} of size {read[1]} made from them: "
                "these can't be coded by what attention reads"
            )


def prepare(model: PreTrainedModel, held_out: list[Tensor], coded: Iterable[int]) -> HeldOut:
    """Run the uncompressed model once over windows [1, T], all of one length. `coded`: indices of the layers that will be coded."""
    ids = torch.cat(held_out).to(model.device)
    split = ids.shape[1] - max(ids.shape[1] // SCORED_SHARE, 1)
    context = DynamicCache(config=model.config.get_text_config(decoder=True))
    recorder = QueryRecorder(frozenset(coded))
    with torch.no_grad():
        model.base_model(input_ids=ids[:, :split], use_cache=True, **cache_argument(model, context))
        with recording(model, recorder.attention):
            logits = model(input_ids=ids[:, split:], use_cache=True, **cache_argument(model, deepcopy(context))).logits
    return HeldOut(context, ids[:, split:], torch.stack([row.float().log_softmax(-1) for row in logits]), recorder.asked)


def with_measured(profile: Profile, windows: HeldOut, preset: CompressionPreset, config: CacheConfig, quantizer: str) -> Profile:
    """`profile` with what follows from its codes of the contexts of the windows: every layer's median K error, against which unusual keys stand out, the
    share of tokens that should stay exact, and the mass that the others lack."""
    layers: dict[int, LayerProfile] = {}
    device = windows.scored.device
    start = torch.zeros(len(windows.scored), dtype=torch.int64, device=device)
    for index, codec in build_codec(profile, preset, Dials(), device, quantizer).items():
        layer: Any = windows.context.layers[index]
        slots = torch.arange(layer.keys.shape[2], device=device)
        planes, gains, _, _ = codec.encode(layer.keys, layer.values, slots, start)
        error = codec.key_error(layer.keys, planes, gains, slots, start)
        typical = float(error[:, config.sinks :].median())
        exact = replace(codec, exact_error=profile.choices.exact_error * typical).exact_need(codec.value_size(layer.values), error) > 1
        packed = (slots >= config.sinks) & (slots < (len(slots) - config.window) // UNIT * UNIT)
        mass = missing_mass(windows.asked[index], layer.keys, codec.decode_keys(planes, gains, slots, start), packed & ~exact)
        layers[index] = replace(
            profile.layers[index],
            key_error=typical,
            exact_share=float(exact[:, config.sinks :].float().mean()),
            missing_mass=mass / max(codec.key_expected, EPS) if profile.choices.add_mass else None,
        )
    return replace(profile, layers=layers)


def measure(
    model: PreTrainedModel,
    windows: HeldOut,
    profile: Profile,
    preset: CompressionPreset,
    config: CacheConfig,
    quantizer: str = "uniform",
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """Mean KL (nats per token), score (see above) and argmax agreement of `profile` over the windows."""
    cache = SpectralCache(model.config, build_codec(profile, preset, Dials(), model.device, quantizer, progress), config)
    cache.fill(deepcopy(windows.context))
    with torch.no_grad():
        logits = model(input_ids=windows.scored, use_cache=True, **cache_argument(model, cache)).logits
    divergence: list[Tensor] = []
    agree: list[Tensor] = []
    for want, row in zip(windows.reference, logits, strict=True):  # one by one: a large vocabulary makes these the largest tensors of all
        got = row.float().log_softmax(-1)
        divergence.append((want.exp() * (want - got)).sum(-1))
        agree.append((want.argmax(-1) == got.argmax(-1)).float())
    kl = torch.cat(divergence)
    score = kl.clamp_min(0).sqrt().mean().square()  # rounding can leave -1e-9
    return {"kl": float(kl.mean()), "score": float(score), "agreement": float(torch.cat(agree).mean())}
