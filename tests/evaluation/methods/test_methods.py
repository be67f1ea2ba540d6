"""Every peer on one tiny model, through the steps that tasks take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import METHODS, Prepared, Subject, find_method
from spectralquant.evaluation.metrics import token_divergence
from spectralquant.evaluation.tasks.base import continue_with, hand_over, read_context

CONTEXT, SCORED = 300, 20
PEERS = [name for name, method in METHODS.items() if not method.family.startswith("spectralquant")]
BITS = {
    "fp16": 16.0,
    "fp8": 8.5,
    "fp8-unscaled": 8.0,
    "q8_0": 8.5,
    "q4_0": 4.5,
    "q4_0-hadamard": 4.5,
    "rotation2": 2.5,
    "rotation3": 3.5,
    "rotation4": 4.5,
    "pca2": 2.0,
    "pca2.375": 2.375,
    "pca3": 3.0,
    "quanto-int4": 4.5,
    "quanto-int2": 2.5,
    "hqq-int4": 4.5,
    "hqq-int2": 2.5,
    "kivi2-g32": 3.0,
    "kivi4-g32": 5.0,
    "kivi2-g128": 2.625,
    "kivi4-g128": 4.625,
}
"""All-in, at head size 32."""


@pytest.fixture(scope="module")
def subject(llama: PreTrainedModel, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(llama, tokenizer, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 199, (1, CONTEXT + SCORED), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def context(llama: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    return read_context(llama, ids[:, :CONTEXT])


@pytest.fixture(scope="module")
def reference(llama: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return llama(input_ids=ids).logits[0, CONTEXT:].float().log_softmax(-1)


def prepare(name: str, subject: Subject) -> Prepared:
    """Skips where a package or a compiler is not there."""
    try:
        return find_method(name).prepare(subject)
    except ConfigError as error:
        if "pip install" not in str(error) and "compiler" not in str(error):
            raise
        pytest.skip(str(error))


def divergence(reference: Tensor, logits: Tensor, ids: Tensor) -> float:
    return float(token_divergence(reference, logits.log_softmax(-1), ids[0, CONTEXT + 1 :])["kl"].mean())


@pytest.mark.parametrize("name", PEERS)
def test_peer_continues_a_context(name: str, subject: Subject, ids: Tensor, context: list[tuple[Tensor, Tensor]], reference: Tensor) -> None:
    method = prepare(name, subject)
    before = [(k.clone(), v.clone()) for k, v in context]
    cache = hand_over(context, method.cache())
    bits, exact = method.bits(cache), method.exact(cache)
    assert bits == pytest.approx(BITS[name]) and bits <= 16
    assert exact == {"kivi": CONTEXT - (256 + 172) // 2, "pca": 4 + 128}.get(name[:4].rstrip("23"), 0)
    got = continue_with(subject.model, cache, ids[:, CONTEXT:], 16)
    assert got.shape == (SCORED, 199) and got.isfinite().all() and cache.get_seq_length() == CONTEXT + SCORED
    assert all(torch.equal(a, b) for old, new in zip(before, context, strict=True) for a, b in zip(old, new, strict=True))  # the next method needs it
    assert abs(divergence(reference, got, ids)) < (1e-6 if name == "fp16" else 3e-3)


@pytest.mark.parametrize(
    "names",
    [
        ("rotation2", "rotation3", "rotation4", "fp16"),
        ("pca2", "pca2.375", "pca3", "fp16"),
        ("kivi2-g32", "kivi4-g32", "fp16"),
        ("kivi2-g128", "kivi4-g128", "fp16"),
        ("q4_0", "q8_0"),
        ("q4_0-hadamard", "q8_0"),
        ("quanto-int2", "quanto-int4", "fp16"),
        ("hqq-int2", "hqq-int4", "fp16"),
        ("rotation2", "fp8", "fp16"),
    ],
)
def test_more_bits_diverge_less(names: tuple[str, ...], subject: Subject, ids: Tensor, context: list[tuple[Tensor, Tensor]], reference: Tensor) -> None:
    kl = []
    for name in names:
        cache = hand_over(context, prepare(name, subject).cache())
        kl.append(divergence(reference, continue_with(subject.model, cache, ids[:, CONTEXT:], 16), ids))
    assert kl == sorted(kl, reverse=True) and len(set(kl)) == len(kl)


def test_every_peer_is_known() -> None:
    assert BITS.keys() == set(PEERS)
    assert all(METHODS[name].simulated == (not name.startswith(("quanto", "hqq"))) for name in PEERS)


def test_unknown_method_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'nothing' is unknown: expected one of .*fp16"):
        find_method("nothing")


def test_caches_of_one_method_are_independent(subject: Subject, context: list[tuple[Tensor, Tensor]], ids: Tensor) -> None:
    method = find_method("rotation2").prepare(subject)
    first = hand_over(context, method.cache())
    want = continue_with(subject.model, first, ids[:, CONTEXT:], 16)
    second = hand_over(context, method.cache())
    assert first.get_seq_length() == CONTEXT + SCORED and second.get_seq_length() == CONTEXT
    assert torch.equal(continue_with(subject.model, second, ids[:, CONTEXT:], 16), want)


def test_folder_holds_what_was_measured(subject: Subject) -> None:
    find_method("pca2").prepare(subject)
    assert isinstance(subject.folder, Path) and (subject.folder / "pca.safetensors").is_file()
