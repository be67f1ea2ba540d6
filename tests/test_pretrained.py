"""Calibrations in folders: cards, and what lies beside a model."""

import logging
import re
from pathlib import Path

import pytest
from tiny_models import TinyTokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from spectralquant import SpectralQuant, SpectralQuantEngine
from spectralquant.errors import CalibrationError, ConfigError, ProfileError
from spectralquant.presets import PRESETS

PROMPT = list(range(5, 190)) * 3


def test_round_trip(engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer, tmp_path: Path) -> None:
    folder = engine.save_pretrained(tmp_path / "kept")
    again = SpectralQuant.from_pretrained(folder, compression="ultra")
    assert again.preset_name == "ultra" and sorted(f.name for f in folder.iterdir()) == ["README.md", "calibration.safetensors"]
    want = SpectralQuantEngine(compression="ultra")
    want.add_calibration(engine.profile_of(llama))
    tokens = [quant.generate(llama, tokenizer, PROMPT, max_new_tokens=8)["tokens"] for quant in (want, again)]
    assert tokens[0] == tokens[1]
    assert engine.save_pretrained(folder) == folder  # over an older one


def test_card_says_what_was_measured(engine: SpectralQuantEngine, llama: PreTrainedModel, tmp_path: Path) -> None:
    card = (engine.save_pretrained(tmp_path) / "README.md").read_text(encoding="utf-8")
    certificate = engine.profile_of(llama).certificate
    assert card.startswith("---\nlibrary_name: spectralquant\n") and "LlamaForCausalLM" in card
    assert f"KL {certificate['kl']:.4f} nats per token" in card and card.count("| yes |") + card.count("| no |") == len(certificate["menu"])
    for name, preset in PRESETS.items():
        bits, ratio = re.search(rf"\| {name} \| ([\d.]+) \| ([\d.]+)x \|", card).groups()
        assert float(ratio) >= preset.ratio * 0.994 and float(bits) * float(ratio) == pytest.approx(16, rel=0.01)
    assert "Nothing is known" not in card


def test_card_of_a_model_is_not_lost(engine: SpectralQuantEngine, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My model\n")
    with pytest.raises(ConfigError, match=r"would be lost; save to .*spectralquant"):
        engine.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["README.md"] and (tmp_path / "README.md").read_text() == "# My model\n"


def test_save_rejects_a_file_and_an_empty_engine(engine: SpectralQuantEngine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        engine.save_pretrained(tmp_path / "file")
    with pytest.raises(CalibrationError, match="no calibration yet"):
        SpectralQuantEngine().save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_from_pretrained_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"calibration\.safetensors does not exist"):
        SpectralQuant.from_pretrained(tmp_path)


def test_calibration_beside_the_model_is_found(engine: SpectralQuantEngine, tokenizer: TinyTokenizer, tmp_path: Path, calibrations: Path) -> None:
    """`generate` of an engine without a calibration takes it: nothing is measured, nothing kept."""
    save_tiny_model(tmp_path / "model")
    engine.save_pretrained(tmp_path / "model" / "spectralquant")
    loaded, fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), SpectralQuantEngine()
    assert fresh.ensure_calibrated(loaded, tokenizer) == tmp_path / "model" / "spectralquant" / "calibration.safetensors"
    assert fresh.ensure_calibrated(loaded, tokenizer) is None and not calibrations.exists()
    assert SpectralQuant().generate(loaded, tokenizer, PROMPT, max_new_tokens=4)["tokens"] and not calibrations.exists()
    SpectralQuant.from_pretrained(tmp_path / "model").generate(loaded, tokenizer, PROMPT, max_new_tokens=2)


def test_calibration_of_another_model_beside_it_is_not_used(
    engine: SpectralQuantEngine, tokenizer: TinyTokenizer, tmp_path: Path, calibrations: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model(tmp_path / "model", "qwen3")
    engine.save_pretrained(tmp_path / "model" / "spectralquant")
    loaded, fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), SpectralQuantEngine()
    assert fresh.ensure_calibrated(loaded, tokenizer, progress=False) is None
    assert fresh.is_calibrated(loaded) and len(list(calibrations.glob("*.safetensors"))) == 1
    assert [r.levelno for r in caplog.records if "made for another model" in r.message] == [logging.WARNING]
