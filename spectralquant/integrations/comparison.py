"""What coded keys and values do to an encoder's output: the figures of `EncoderEngine.compare`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectralquant.errors import ConfigError

MAIN_OUTPUTS = ("logits", "last_hidden_state", "predicted_depth", "image_embeds", "pooler_output")
"""Which of a model's outputs is compared: the first that is there, else its first floating-point tensor."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Coded against uncoded.

    Attributes:
        output: Which output was compared.
        vectors: How many vectors along its last dimension: images, clips, tokens, rows of pixels. Padding is left out.
        cosine: Between the two of a vector, mean.
        relative_error: |coded - uncoded| / |uncoded| over all vectors, Euclidean.
        kl: KL(uncoded || coded) of the distributions that logits mean, in nats, mean; None for other outputs.
        same_class: Share of vectors whose largest logit is the same; None for other outputs.
    """

    output: str
    vectors: int
    cosine: float
    relative_error: float
    kl: float | None
    same_class: float | None

    def __str__(self) -> str:
        logits = "" if self.kl is None or self.same_class is None else f", KL {self.kl:.5f}, same class {100 * self.same_class:.1f} %"
        return f"cosine {self.cosine:.5f}, relative error {self.relative_error:.4f}{logits} ({self.vectors:,} vectors of {self.output})"


def main_output(batch: Any, out: Any) -> tuple[str, Tensor]:
    """Name of the output that is compared, and its vectors [N, C] without padding, float64.

    Raises:
        ConfigError: There is no floating-point tensor of two dimensions or more.
    """
    named = dict(out) if isinstance(out, Mapping) else {str(i): x for i, x in enumerate(out if isinstance(out, (tuple, list)) else (out,))}
    found = {name: x for name, x in named.items() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2}
    name = next((n for n in (*MAIN_OUTPUTS, *found) if n in found), None)
    if name is None:
        raise ConfigError(f"the model returned {type(out).__name__}, in which there is no floating-point tensor of two dimensions or more to compare")
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    x = found[name].double()
    return name, x[mask.to(x.device).bool()] if isinstance(mask, Tensor) and mask.shape == x.shape[:-1] else x.flatten(0, -2)


def compare_outputs(pairs: Iterable[tuple[Tensor, Tensor]], output: str) -> Comparison:
    """Figures of (uncoded, coded) vectors [N, C] each, batch by batch."""
    totals = torch.zeros(6, dtype=torch.float64)
    for want, got in pairs:
        cosine = torch.cosine_similarity(want, got, dim=-1).sum()
        sums = [torch.tensor(float(len(want))), cosine, (got - want).square().sum(), want.square().sum(), *_of_logits(want, got)]
        totals += torch.stack([s.double().cpu() for s in sums])
    count, cosine, error, size, kl, same = totals.tolist()
    of_logits = (kl / count, same / count) if output == "logits" else (None, None)
    return Comparison(output, int(count), cosine / count, (error / size) ** 0.5 if size else 0.0, *of_logits)


def _of_logits(want: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    log_want, log_got = want.log_softmax(-1), got.log_softmax(-1)
    return (log_want.exp() * (log_want - log_got)).sum(), (want.argmax(-1) == got.argmax(-1)).sum()
