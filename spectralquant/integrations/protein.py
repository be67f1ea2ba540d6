"""Protein models: ESM-2, ESMFold with its folding trunk, and the Evoformer and Pairformer attention of models like AlphaFold."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from spectralquant.errors import NotSupportedError
from spectralquant.integrations.encoder import EncoderEngine
from spectralquant.integrations.inputs import Inputs, processed

_POINTS = "InvariantPointAttention"
_WHY_NOT = (
    "invariant point attention can't be computed from coded keys: its logits are distances between points that turn with every residue's frame, so keys have "
    "no covariance in common, and its values are points whose coding would break invariance. It stays as it is; apply_to_alphafold_evoformer codes the rest"
)


def calibrate_esm(
    model: nn.Module, tokenizer: Any, sequences: Iterable[str], *, n_calib: int | None = None, batch_size: int = 4, **options: Any
) -> EncoderEngine:
    """An engine that is calibrated on amino-acid sequences, for ESM-2 and ESMFold; the rest as for `vision.calibrate_vit`."""
    engine = EncoderEngine(**options)
    engine.calibrate(model, processed(sequences, tokenizer and (lambda batch: tokenizer(batch, return_tensors="pt", padding=True)), n_calib, batch_size))
    return engine


def apply_to_esm(model: nn.Module, engine: EncoderEngine) -> nn.Module:
    """`engine.apply_to(model)`."""
    return engine.apply_to(model)


def calibrate_alphafold(model: nn.Module, inputs: Inputs, **options: Any) -> EncoderEngine:
    """An engine that is calibrated on features as the model takes them, or by a function that runs it. Attention over MSA rows and columns and over triangles
    is OpenFold's `Attention`; others need an adapter (`EncoderEngine(adapters=...)`)."""
    engine = EncoderEngine(**options)
    engine.calibrate(model, inputs)
    return engine


def apply_to_alphafold(model: nn.Module, engine: EncoderEngine, skip_ipa: bool = True) -> nn.Module:
    """`engine.apply_to(model)`; invariant point attention stays as it is.

    Raises:
        NotSupportedError: It may not be skipped, and the model has it.
    """
    if not skip_ipa and any(_POINTS in type(module).__name__ for module in model.modules()):
        raise NotSupportedError(_WHY_NOT)
    return engine.apply_to(model)


def apply_to_alphafold_evoformer(model: nn.Module, engine: EncoderEngine) -> nn.Module:
    """`apply_to_alphafold`."""
    return apply_to_alphafold(model, engine)


def apply_to_alphafold_ipa(model: nn.Module, engine: EncoderEngine) -> nn.Module:
    """Refused.

    Raises:
        NotSupportedError: Always; it says why.
    """
    raise NotSupportedError(_WHY_NOT)
