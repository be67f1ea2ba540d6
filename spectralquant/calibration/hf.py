"""Run a HuggingFace causal LM over text and gather the statistics of every layer that will be coded.

Keys, queries and values are read where they meet, in the attention function or in the products of attention modules; cos and sin where the model hands them
to its attention modules. Nothing is ever swallowed: a layer that shows no attention is an error.
"""

import hashlib
import sys
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectralquant.calibration.products import layer_index
from spectralquant.calibration.recording import recording
from spectralquant.calibration.statistics import LayerStatistics, felt_errors, matmul_precision
from spectralquant.errors import CalibrationError, UnsupportedModelError
from spectralquant.rope import Rotary

SKIP = 8
"""First positions of each sample left out of the statistics: attention sinks, which stay exact anyway."""
QUERIES = 64
"""Queries of each sample whose attention is looked at, spread over its last three quarters."""
DEFAULT_LONGEST = 2048
"""Positions of a model whose configuration does not say."""
TOKENS_PER_DIMENSION = 4
"""With fewer tokens per head dimension, covariances are shrunken (`spectrum.shrink`) and the user is told."""
OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "proj", "linear_o")


@dataclass(slots=True)
class ModelStatistics:
    """All a profile is fitted from.

    Attributes:
        layers: Layer index -> statistics.
        rotary: Layer index -> rotation, for layers whose rotary embedding could be read and reproduced.
        output_metric: Layer index -> W_O metric [H, D, D] float64, where the output projection could be read.
        fingerprint: See `fingerprint`.
        tokens: Tokens that counted.
        longest: Positions that the model was made for.
    """

    fingerprint: dict[str, Any]
    layers: dict[int, LayerStatistics] = field(default_factory=dict)
    rotary: dict[int, Rotary] = field(default_factory=dict)
    output_metric: dict[int, Tensor] = field(default_factory=dict)
    tokens: int = 0
    longest: int = DEFAULT_LONGEST


_known: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def unwrapped(model: Any) -> Any:
    """The model inside wrappers of torch.compile and peft."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a model: architecture, shapes, and a hash over a sample of its weights.

    The signs of up to 64 values of every parameter go into the hash: rounding to float16 or bfloat16 keeps them, so the same model in any of these
    shares its calibration, while a fine-tune turns some of these thousands and does not.
    """
    model = unwrapped(model)
    _known[model] = {**architecture(model), "weights": weights_digest(model)}
    return _known[model]


def architecture(model: PreTrainedModel) -> dict[str, Any]:
    """What of a `fingerprint` shows without weights."""
    text = model.config.get_text_config(decoder=True)
    return {
        "architecture": type(model).__name__,
        "layers": getattr(text, "num_hidden_layers", None),
        "hidden_size": getattr(text, "hidden_size", None),
        "query_heads": getattr(text, "num_attention_heads", None),
    }


def weights_digest(model: nn.Module, signs_only: bool = True) -> str:
    """A hash over up to 64 values of every parameter, or over their signs, see `fingerprint`."""
    return values_digest(((name, parameter.shape, _stored(model, name, parameter)) for name, parameter in sorted(model.named_parameters())), signs_only)


def values_digest(parameters: Iterable[tuple[str, torch.Size, Tensor]], signs_only: bool = True) -> str:
    """What `weights_digest` gives for a model with these parameters: name, shape and values, in the order of their names. They are read one after another."""
    digest = hashlib.sha256()
    for name, shape, values in parameters:
        digest.update(f"{name.removeprefix('model.')}{tuple(shape)}".encode())
        if values.is_floating_point() and values.device.type != "meta":
            sample = sampled(values.detach())
            digest.update((sample > 0 if signs_only else sample.float()).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def sampled(values: Tensor) -> Tensor:
    """Up to 64 values, evenly spread."""
    flat = values.flatten()
    return flat[:: max(len(flat) // 64, 1)][:64]


def known_fingerprint(model: Any) -> dict[str, Any]:
    """The latest `fingerprint` of this model object: reading the weights again for every cache would take longer than a step."""
    model = unwrapped(model)
    return _known.get(model) or fingerprint(model)


def _stored(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The values of `parameter`, also of one that accelerate keeps elsewhere between two passes, and of one that stands for codes."""
    module, _, leaf = name.rpartition(".")
    weights = getattr(getattr(model.get_submodule(module), "_hf_hook", None), "weights_map", None)
    stored = weights[leaf] if parameter.device.type == "meta" and weights is not None else parameter
    return _decoded(stored)


def _decoded(weight: Tensor) -> Tensor:
    """`weight`, or what it stands for where its class holds codes (torchao)."""
    return weight if type(weight).dequantize is Tensor.dequantize else weight.dequantize()


class _Recorder:
    """Receives every attention call of one forward pass."""

    def __init__(self, statistics: ModelStatistics, coded: set[int]) -> None:
        self.statistics, self.coded = statistics, coded
        self.embeddings: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (cos, sin)
        self.known: set[int] = set()
        self.unread: set[int] = set()  # layers that turn their keys in a way that could not be reproduced

    def before_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        embeddings = kwargs.get("position_embeddings")
        if isinstance(embeddings, tuple) and len(embeddings) == 2 and kwargs.get("alibi") is None:  # Falcon hands both over and uses one
            self.embeddings[layer_index(module)] = embeddings  # pyright: ignore[reportArgumentType]

    def attention(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> None:
        index = layer_index(module)
        if index not in self.coded:
            return
        stats = self.statistics.layers.setdefault(index, LayerStatistics())
        if index not in self.known:
            self._first_sight(index, module, query, key, value)
        key, value = key[0].float(), value[0].float()
        positions = torch.arange(key.shape[1], device=key.device)
        asked = torch.linspace(key.shape[1] // 4, key.shape[1] - 1, min(QUERIES, key.shape[1] // 2 + 1), device=key.device).long()
        query = query[0][:, asked].float().unflatten(0, (key.shape[0], -1))  # [H, G, n, D]
        felt = felt_errors(query * scale, key, value, asked, self.statistics.output_metric.get(index), softcap, SKIP)
        rotary = self.statistics.rotary.get(index)
        if rotary is not None:
            query, key = rotary.rotate(query, -asked), rotary.rotate(key, -positions)
        # Covariances may round their factors to bfloat16: 2^-9 of them is nothing beside the quantizer's error.
        with matmul_precision("medium"):
            stats.add(key[:, SKIP:], query.flatten(1, 2), value[:, SKIP:], felt.after(SKIP))

    def _first_sight(self, index: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.known.add(index)
        if key.shape[-1] != value.shape[-1]:
            raise UnsupportedModelError(
                f"layer {index} ({type(module).__name__}) has keys of size {key.shape[-1]} and values of size {value.shape[-1]}; the codec needs one size"
            )
        if index in self.embeddings and getattr(module, "use_rope", True):
            rotary = read_rotary(module, *self.embeddings[index], key.shape[-1])
            if rotary is not None:
                self.statistics.rotary[index] = rotary
            else:
                self.unread.add(index)
        metric = output_metric(module, key.shape[1], query.shape[1] // key.shape[1], key.shape[-1])
        if metric is not None:
            self.statistics.output_metric[index] = metric


def read_rotary(module: nn.Module, cos: Tensor, sin: Tensor, dim: int) -> Rotary | None:
    """The rotation a module applies for positions 0 .. T-1, or None if it can't be reproduced (then the plain frame is used).

    cos, sin: [1, T, R or R/2]. Frequencies are read from the angles (`_frequencies`); the layout of the pairs is found by
    comparing with the module's own `apply_rotary_pos_emb`.
    """
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if apply is None or cos.dim() != 3 or cos.shape[1] < 2:
        return None
    names = signature(apply).parameters
    heads_last = "tensor" in names  # GPT-J and CodeGen: sin first, one tensor, heads behind positions
    sin, cos = (x[:1].float().cpu() for x in ((cos, sin) if heads_last else (sin, cos)))
    scale = (cos.square() + sin.square()).mean().sqrt()
    probe = torch.randn(1, 1, cos.shape[1], dim, generator=torch.Generator().manual_seed(0))

    def turn(x: Tensor) -> Tensor:
        if heads_last:
            return apply(x.transpose(1, 2), sin, cos).transpose(1, 2)
        return apply(x, cos, sin) if "x" in names else apply(x, x, cos, sin)[1]  # the former is Gemma 4

    width = cos.shape[-1]
    turned = _turned_part(turn, probe, (dim, width, 2 * width))
    if turned is None:
        return None
    turned = torch.cat([turned / scale, probe[..., turned.shape[-1] :]], -1)
    frequency = _frequencies(torch.atan2(sin[0].double(), cos[0].double()))
    first, even = frequency[: width // 2], frequency[::2]
    for interleaved, freq in ((False, first), (True, even), (True, first), (False, frequency), (True, frequency)):
        rotary = Rotary(freq.contiguous(), interleaved)
        if rotary.dim <= dim:
            mine = rotary.rotate(probe, torch.arange(cos.shape[1]))
            unscaled = turned if rotary.dim == dim else torch.cat([turned[..., : rotary.dim], probe[..., rotary.dim :]], -1)
            if (mine - unscaled).abs().mean() < 0.02:
                return rotary
    return None


def _turned_part(turn: Callable[[Tensor], Tensor], probe: Tensor, sizes: tuple[int, ...]) -> Tensor | None:
    """What `turn` makes of the first coordinates of `probe` [..., D]; families differ in how many they hand over."""
    for size in sizes:
        try:
            return turn(probe[..., :size])
        except (RuntimeError, TypeError):
            continue
    return None


def _frequencies(angle: Tensor) -> Tensor:
    """Radians per position [R] of angles [T, R] at positions 0 .. T - 1, known up to full turns and to the rounding of cos and sin.

    In bfloat16 the angle at position 1 is off by up to 0.004, which is 4 rad at position 1,000. Angles further out are as precise, so every doubling of the
    position halves the error, and is close enough to count the turns of the next; a line through all of them does the rest.
    """
    position = torch.arange(len(angle), dtype=torch.float64)
    frequency, reach = angle[1], 2
    while reach < len(angle):
        frequency = frequency + _turn(angle[reach] - reach * frequency) / reach
        reach *= 2
    return frequency + position @ _turn(angle - position[:, None] * frequency) / position.square().sum()


def _turn(angle: Tensor) -> Tensor:
    """Angles less full turns, -pi .. pi."""
    return torch.remainder(angle + torch.pi, 2 * torch.pi) - torch.pi


def output_metric(module: nn.Module, heads: int, groups: int, dim: int) -> Tensor | None:
    """sum over a group's heads of W_O,h W_O,h^T, [H, D, D] float64, or None when the output projection can't be read."""
    for name in OUTPUT_NAMES:
        weight = getattr(getattr(module, name, None), "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
            continue
        weight = _decoded(weight).detach().float()
        if type(getattr(module, name)).__name__ == "Conv1D":  # GPT-2 stores [in, out]
            weight = weight.T
        if weight.shape[1] == heads * groups * dim:
            w = weight.T.reshape(heads, groups * dim, -1).unflatten(1, (groups, dim))
            return torch.einsum("hgdo,hgeo->hde", w, w).double().cpu()
    return None


def collect(model: PreTrainedModel, samples: list[Tensor], coded: list[int], progress: Callable[[int], None] = lambda n: None) -> ModelStatistics:
    """Statistics of the layers `coded` over token samples [1, T].

    Args:
        model: Any causal LM of transformers.
        samples: Token ids; move to the model's device is done here.
        coded: Indices of the layers to look at.
        progress: Called with the number of tokens done after each sample.

    Raises:
        UnsupportedModelError: A layer's queries, keys and values could not be found, or are of unequal sizes; the text names it.
        CalibrationError: No sample is long enough for a token to count.

    Warns:
        UserWarning: There are few tokens for covariances of the model's head size, or a rotary embedding could not be read.
    """
    text = model.config.get_text_config(decoder=True)
    statistics = ModelStatistics(fingerprint(model), longest=getattr(text, "max_position_embeddings", None) or DEFAULT_LONGEST)
    recorder = _Recorder(statistics, set(coded))
    with recording(model, recorder.attention, recorder.before_attention), _rounded_projections(model), torch.no_grad():
        for ids in samples:
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
            statistics.tokens += max(ids.shape[1] - SKIP, 0)
            progress(ids.shape[1])
    if not statistics.tokens:
        raise CalibrationError(f"the calibration text has no sample longer than {SKIP} tokens: bring more text")
    missing = sorted(set(coded) - statistics.layers.keys())
    if missing:
        raise UnsupportedModelError(
            f"layers {missing[:4]} of {type(model).__name__} attend neither by transformers' attention interface nor by products in modules that say their "
            "layer's index; they can't be calibrated"
        )
    if recorder.unread:
        warnings.warn(
            f"the rotary embedding of layers {sorted(recorder.unread)[:4]} of {type(model).__name__} could not be reproduced: their keys are coded as "
            "they are stored, after the rotation, which needs more bits for the same quality",
            stacklevel=2,
        )
    dim = next(iter(statistics.layers.values())).keys.mean.shape[-1]
    need = TOKENS_PER_DIMENSION * dim
    if statistics.tokens < need:
        warnings.warn(
            f"the calibration text has {statistics.tokens} usable tokens, few for head size {dim}: the output will be worse than it could be; "
            f"add at least {need - statistics.tokens} tokens",
            stacklevel=2,
        )
    return statistics


@contextmanager
def _rounded_projections(model: PreTrainedModel) -> Generator[None]:
    """Linear layers may round the factors of float32 products to bfloat16, which halves the time on a CPU with such instructions.

    No other product may: a rotary embedding is one too, of positions and frequencies, and some processors would round these.
    """
    before = torch.get_float32_matmul_precision()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [m.register_forward_pre_hook(lambda *_: torch.set_float32_matmul_precision("medium")) for m in linear]
    hooks += [m.register_forward_hook(lambda *_: torch.set_float32_matmul_precision(before)) for m in linear]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for hook in hooks:
            hook.remove()
