"""The same calibration is measured once, whoever asks and however many at a time."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_models import TinyTokenizer, save_tiny_model, tiny_model
from transformers import PreTrainedModel

from spectralquant import SpectralQuant, SpectralQuantEngine, get_default_calibration_texts
from spectralquant.config import CacheConfig

TEXTS = get_default_calibration_texts(4)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_second_call_loads_the_same_calibration(llama: PreTrainedModel, tokenizer: TinyTokenizer, calibrations: Path) -> None:
    first, second = SpectralQuantEngine(), SpectralQuantEngine()
    measured = first.calibrate(llama, tokenizer, TEXTS, progress=False)
    loaded = second.calibrate(llama, tokenizer, TEXTS, progress=False)
    assert measured["loaded_from"] is None and loaded["loaded_from"] == str(files(calibrations)[0])
    assert loaded["certificate"] == measured["certificate"] and loaded["tokens"] == measured["tokens"]
    mine, other = first.profile_of(llama), second.profile_of(llama)
    assert mine.choices == other.choices and all(torch.equal(mine.layers[i].key.basis, other.layers[i].key.basis) for i in mine.layers)


def test_what_decides_a_calibration_decides_its_name(llama: PreTrainedModel, tokenizer: TinyTokenizer, calibrations: Path) -> None:
    """Each of these is another calibration, none is taken for another."""
    other, scaled = tiny_model("llama", seed=1), tiny_model("llama")
    with torch.no_grad():
        scaled.model.layers[0].self_attn.k_proj.weight.mul_(2.0)  # every sign is as it was
    calls = [
        (llama, TEXTS, None, {}),
        (llama, TEXTS[:3], None, {}),
        (llama, TEXTS, 2, {}),
        (llama, TEXTS, None, {"compression": "ultra"}),
        (llama, TEXTS, None, {"quantizer": "uniform"}),
        (llama, TEXTS, None, {"cache_config": CacheConfig(window=200)}),
        (other, TEXTS, None, {}),
        (scaled, TEXTS, None, {}),
    ]
    for count, (model, texts, samples, settings) in enumerate(calls, 1):
        assert SpectralQuantEngine(**settings).calibrate(model, tokenizer, texts, samples, progress=False)["loaded_from"] is None
        assert len(files(calibrations)) == count


def test_engine_without_the_cache_neither_reads_nor_writes(llama: PreTrainedModel, tokenizer: TinyTokenizer, calibrations: Path) -> None:
    apart = SpectralQuant(calibration_cache=False)
    apart.calibrate(llama, tokenizer, TEXTS)
    assert not calibrations.exists()
    SpectralQuantEngine().calibrate(llama, tokenizer, TEXTS, progress=False)
    assert apart.calibrate(llama, tokenizer, TEXTS)["loaded_from"] is None


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b"", lambda b: b[:-8] + bytes(8)], ids=["short", "empty", "changed"])
def test_damaged_file_is_made_again(llama: PreTrainedModel, tokenizer: TinyTokenizer, calibrations: Path, caplog: pytest.LogCaptureFixture, damage) -> None:
    SpectralQuantEngine().calibrate(llama, tokenizer, TEXTS, progress=False)
    file = files(calibrations)[0]
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert SpectralQuantEngine().calibrate(llama, tokenizer, TEXTS, progress=False)["loaded_from"] is None
    assert "made again" in caplog.text
    assert SpectralQuantEngine().calibrate(llama, tokenizer, TEXTS, progress=False)["loaded_from"] == str(file)


def test_folder_that_cannot_be_written(llama: PreTrainedModel, tokenizer: TinyTokenizer, calibrations: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file stands where the folder should be: not even root can write there."""
    calibrations.parent.parent.mkdir(exist_ok=True)
    calibrations.parent.write_text("not a folder")
    assert SpectralQuantEngine().calibrate(llama, tokenizer, TEXTS, progress=False)["calibrated"]
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "SPECTRALQUANT_HOME" in caplog.text


def test_threads_measure_once(llama: PreTrainedModel, tokenizer: TinyTokenizer, calibrations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    measure = SpectralQuantEngine._measure
    monkeypatch.setattr(SpectralQuantEngine, "_measure", lambda self, *a: calls.append(1) or measure(self, *a))
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: SpectralQuantEngine().calibrate(llama, tokenizer, TEXTS, progress=False), range(3)))
    assert len(calls) == 1 and sum(r["loaded_from"] is None for r in results) == 1
    llama.__dict__.pop("_spectralquant", None)


PROCESS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from spectralquant import SpectralQuantEngine, get_default_calibration_texts
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
print(SpectralQuantEngine().calibrate(model, tokenizer, get_default_calibration_texts(4), progress=False)["loaded_from"])
"""


def test_processes_measure_once(tmp_path: Path) -> None:
    """Three processes at once: one measures, the others wait for it and load."""
    save_tiny_model(tmp_path / "model")
    environment = {**os.environ, "SPECTRALQUANT_HOME": str(tmp_path / "shared")}
    started = [subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path / "model")], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate(timeout=300)[0].strip() for process in started]
    assert answers.count("None") == 1 and all(process.returncode == 0 for process in started)
    assert {a for a in answers if a != "None"} == {str(f) for f in files(tmp_path / "shared" / "calibrations")}
