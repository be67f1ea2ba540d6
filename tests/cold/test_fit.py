"""Fitting an archive model: what it measures, that it leaves the model alone, and what it refuses."""

from pathlib import Path

import pytest
import torch
from tiny_models import TinyTokenizer, tiny_model
from transformers import PreTrainedModel

from spectralquant import SpectralQuantEngine, get_default_calibration_texts
from spectralquant.cold.fit import fit
from spectralquant.corpus import make_samples
from spectralquant.errors import CalibrationError, ConfigError
from spectralquant.profile import Profile, load_profile

SAMPLES = make_samples(TinyTokenizer(), get_default_calibration_texts(12))


@pytest.fixture
def profile(llama_calibration: Path) -> Profile:
    return load_profile(llama_calibration)


def test_layers_that_bear_less_get_less_noise(llama: PreTrainedModel, profile: Profile) -> None:
    """Values of the last layer go through its output projection alone; a hundredth of that is a hundredth of what noise in them does, or less."""
    made = fit(llama, profile, SAMPLES, progress=False)
    assert made.sensitivity is not None and made.sensitivity.keys() == profile.layers.keys()
    assert all(x > 0 for pair in made.sensitivity.values() for x in pair)
    numb = tiny_model()
    with torch.no_grad():
        numb.get_submodule("model.layers.2.self_attn.o_proj").weight.mul_(0.1)
    other = fit(numb, profile, SAMPLES, progress=False)
    assert other.sensitivity is not None
    assert other.sensitivity[2][1] < 0.1 * made.sensitivity[2][1]
    steps = [[side.step for layer in one.archive.layers.values() for side in layer.sides] for one in (made, other)]
    assert steps[1][-1] > steps[0][-1] and steps[1][0] < steps[0][0], "the mean stays"


def test_the_same_text_gives_the_same_archive_model(llama: PreTrainedModel, profile: Profile) -> None:
    one, again, without = (fit(llama, profile, SAMPLES, windows=n, progress=False) for n in (1, 1, 0))
    assert one.archive.digest == again.archive.digest != without.archive.digest
    assert without.sensitivity is None


def test_short_windows_are_enough(llama: PreTrainedModel, profile: Profile) -> None:
    samples = make_samples(TinyTokenizer(), ["a few words of text " * 100])
    assert samples.held_out[0].shape[1] < 96
    made = fit(llama, profile, samples, progress=False)
    assert made.sensitivity is not None and all(x >= 0 for pair in made.sensitivity.values() for x in pair)


def test_logits_that_are_not_finite_are_refused(profile: Profile) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(CalibrationError, match="are not finite; try the model in bfloat16"):
        fit(model, profile, SAMPLES, progress=False)


def test_the_engine_leaves_the_model_as_it_was(llama_calibration: Path) -> None:
    model, engine = tiny_model().train(), SpectralQuantEngine()
    engine.load_calibration(llama_calibration)
    weights, attention = {name: p.clone() for name, p in model.named_parameters()}, model.config._attn_implementation
    archive = engine.fit_archive(model, TinyTokenizer(), get_default_calibration_texts(6), progress=False)
    assert archive.layers.keys() == engine.profile_of(model).layers.keys() and archive.model == engine.profile_of(model).model
    assert model.training and model.config._attn_implementation == attention and "generate" not in vars(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_the_engine_refuses_texts_that_are_none(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="calibration_texts is one string"):
        engine.fit_archive(llama, TinyTokenizer(), "a text", progress=False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CalibrationError, match="too short"):
        engine.fit_archive(llama, TinyTokenizer(), ["a text"], progress=False)
