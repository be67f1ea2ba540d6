"""This package as a method: presets, and engines with other arguments."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectralquant import SpectralQuantEngine
from spectralquant.config import CacheConfig
from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import METHODS, Subject
from spectralquant.evaluation.methods.ours import method_for
from spectralquant.evaluation.tasks.base import hand_over, read_context
from spectralquant.presets import PRESETS
from spectralquant.profile import load_profile

CONTEXT = 300


@pytest.fixture
def subject(llama: PreTrainedModel, llama_calibration: Path, tokenizer: Any, tmp_path: Path) -> Any:
    yield Subject(llama, tokenizer, tmp_path / "run", llama_calibration)
    SpectralQuantEngine().remove_from(llama)


@pytest.fixture
def context(llama: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return read_context(llama, torch.randint(3, 199, (1, CONTEXT), generator=torch.Generator().manual_seed(0)))


def test_presets_are_methods() -> None:
    ours = [method for method in METHODS.values() if method.family == "spectralquant"]
    assert [method.name for method in ours] == list(PRESETS) and not any(method.simulated for method in ours)


def test_options_are_the_engine_s(subject: Subject, context: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The cache is the one of an engine with these arguments, and is as large as its planes say."""
    for options in ({"compression": "standard"}, {"total_bits": 3, "noise_bits": 0, "value_noise_bits": 2}, {"total_bits": 4, "noise_bits": 2}):
        prepared = method_for("mine", "Mine", **options).prepare(subject)
        cache: Any = hand_over(context, prepared.cache())
        assert subject.calibration is not None
        engine = SpectralQuantEngine(**options)
        engine.load_calibration(subject.calibration)
        layout = next(iter(engine.profile_codec().values())).layout
        dim = context[0][0].shape[-1]
        own: Any = hand_over(context, engine.cache(subject.model))
        assert cache.coded_layers[0].codec.layout == layout and cache.nbytes == own.nbytes
        planes = (2 * (layout.key_planes + layout.value_planes) + 16) / (2 * dim)
        assert planes <= prepared.bits(cache) < planes + 1  # exact tokens come on top
        assert prepared.exact(cache) == CONTEXT - 128 + CacheConfig().sinks


def test_calibration_is_made_once_and_shared(subject: Subject, monkeypatch: pytest.MonkeyPatch, llama_calibration: Path) -> None:
    made: list[bool] = []

    def ensure_calibrated(self: SpectralQuantEngine, *_: Any) -> None:
        self.load_calibration(llama_calibration)
        made.append(self.calibration_cache)

    monkeypatch.setattr(SpectralQuantEngine, "ensure_calibrated", ensure_calibrated)
    fresh = replace(subject, calibration=None, calibration_cache=False)
    method_for("a", "A", total_bits=2).prepare(fresh)
    method_for("b", "B", total_bits=3).prepare(fresh)
    assert made == [False] and (subject.folder / "calibration.safetensors").is_file()


@pytest.mark.parametrize(("options", "text"), [({"total_bits": 9}, "avg_bits=9"), ({"noise_bits": 3}, "noise_bits=3"), ({"compression": "tiny"}, "no preset")])
def test_bad_options_are_refused_at_once(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        method_for("mine", "Mine", **options)


def test_the_run_keeps_a_copy_of_the_calibration(subject: Subject) -> None:
    METHODS["high"].prepare(subject)
    kept, given = (load_profile(path) for path in (subject.folder / "calibration.safetensors", subject.calibration or Path()))
    assert kept.model == given.model and torch.equal(kept.layers[0].key.variance, given.layers[0].key.variance)
