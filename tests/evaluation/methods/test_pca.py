"""The original recipe against loops over coordinates, and its statistics against the model's own values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from spectralquant.calibration.fit import fit_profile
from spectralquant.calibration.hf import collect
from spectralquant.codebook import lloyd_max_codebook
from spectralquant.corpus import get_default_calibration_texts, make_samples
from spectralquant.evaluation.methods import Subject, pca
from spectralquant.evaluation.methods.pca import principal_components, static_code
from spectralquant.profile import Profile, SideProfile, load_profile

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pca, "make_samples", lambda tokenizer, texts: make_samples(tokenizer, get_default_calibration_texts(8)))


@pytest.fixture
def subject(llama: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> Subject:
    return Subject(llama, tokenizer, tmp_path)


def test_code_is_the_nearest_level_coordinate_by_coordinate() -> None:
    code = static_code(synthetic.side(2, 8, decay=0.6), 2.0, CPU)
    x = torch.randn(2, 2, 3, 8)
    got = code(x)
    assert set(code.widths.flatten().tolist()) > {0}
    for b in range(2):
        for h in range(2):
            for t in range(3):
                want = code.mean[h, 0].clone()
                for i in range(8):
                    axis, deviation, width = code.basis[h, :, i], float(code.deviation[h, 0, i]), int(code.widths[h, i])
                    if width:
                        levels = lloyd_max_codebook(width).levels
                        at = float((x[b, h, t] - code.mean[h, 0]) @ axis) / deviation
                        want += levels[(levels - at).abs().argmin()] * deviation * axis
                torch.testing.assert_close(got[b, h, t], want, rtol=1e-4, atol=1e-5)


def test_a_vector_takes_its_budget_and_no_more() -> None:
    for bits in (2.0, 2.375, 3.0):
        assert static_code(synthetic.side(3, 32), bits, CPU).widths.sum(-1).tolist() == [int(bits * 32)] * 3


def test_error_is_the_predicted_one_and_falls_with_bits() -> None:
    side = synthetic.side(2, 32, decay=0.1)
    x = synthetic.samples(side, 2000)
    errors = []
    for bits in (2.0, 2.375, 3.0):
        code = static_code(side, bits, CPU)
        distortion = torch.tensor([1.0, *(lloyd_max_codebook(b).distortion for b in range(1, 9))])[code.widths]
        errors.append(float((code(x) - x).square().sum(-1).mean()))
        assert errors[-1] == pytest.approx(float((distortion * side.variance).sum(-1).mean()), rel=0.05)
    assert errors == sorted(errors, reverse=True)


def cached(subject: Subject, side: str) -> tuple[Tensor, Tensor]:
    """Mean [H, D] and covariance [H, D, D] of what the model's own cache holds in layer 1, past the first 8 positions of every sample."""
    rows = []
    for ids in make_samples(subject.tokenizer, get_default_calibration_texts(8)).statistics:
        cache = DynamicCache()
        with torch.no_grad():
            subject.model(input_ids=ids, past_key_values=cache)
        rows.append(getattr(cache.layers[1], side)[0, :, 8:].double())
    x = torch.cat(rows, 1)
    centred = x - x.mean(1, keepdim=True)
    return x.mean(1), centred.mT @ centred / x.shape[1]


def distance(side: SideProfile, covariance: Tensor) -> float:
    """From a diagonal with the claimed variances, in the claimed axes; relative."""
    basis = side.basis.double()
    return float((basis.mT @ covariance @ basis - torch.diag_embed(side.variance.double())).norm() / covariance.norm())


def test_components_of_values_are_those_of_their_covariance(subject: Subject) -> None:
    mean, covariance = cached(subject, "values")
    side = principal_components(subject).layers[1].value
    torch.testing.assert_close(side.mean.double(), mean, rtol=1e-2, atol=2e-3)
    assert distance(side, covariance) < 0.01


def test_components_of_keys_are_those_of_the_cached_ones(subject: Subject) -> None:
    """After the rotary embedding. Only about: they are averaged over more positions than the samples have; keys before the embedding are far off."""
    _, covariance = cached(subject, "keys")
    samples = make_samples(subject.tokenizer, get_default_calibration_texts(8)).statistics
    before = fit_profile(collect(subject.model, samples, [1]), replace(pca.CHOICES, run=1)).layers[1].key
    assert distance(principal_components(subject).layers[1].key, covariance) < 0.4 < 1 < distance(before, covariance)


@pytest.mark.parametrize("side", ["key", "value"])
def test_components_are_orthonormal(subject: Subject, side: str) -> None:
    basis = getattr(principal_components(subject).layers[0], side).basis
    torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1]).expand_as(basis), rtol=0, atol=1e-4)


def test_model_is_left_as_it_was(subject: Subject) -> None:
    before = subject.model.config._attn_implementation, subject.model.training
    principal_components(subject)
    assert (subject.model.config._attn_implementation, subject.model.training) == before


def _forbid(*_: Any) -> Any:
    raise AssertionError("measured again")


def test_components_are_measured_once_per_model(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    first = principal_components(subject)
    with monkeypatch.context() as patch:
        patch.setattr(pca, "collect", _forbid)
        again = principal_components(subject)
    assert torch.equal(first.layers[2].key.basis, again.layers[2].key.basis)

    other = Subject(tiny_model(seed=1), subject.tokenizer, subject.folder)
    assert not torch.equal(principal_components(other).layers[2].key.basis, first.layers[2].key.basis)
    assert load_profile(subject.folder / pca.FILE).model["weights"] != first.model["weights"]


def test_a_file_of_no_use_is_replaced(subject: Subject) -> None:
    made = principal_components(subject)
    path = subject.folder / pca.FILE
    path.write_bytes(path.read_bytes()[:200])
    assert principal_components(subject).layers.keys() == made.layers.keys()
    Profile(made.layers, synthetic.profile().choices, made.model).save(path)  # this model's, in another frame
    assert principal_components(subject).choices == pca.CHOICES
