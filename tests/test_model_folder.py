"""The calibration of a model's folder, found without loading its weights."""

import json
import logging
import os
import shlex
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import FAMILIES, Family
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from spectralquant.calibration.hf import fingerprint
from spectralquant.cli.main import main
from spectralquant.errors import ConfigError, ProfileError
from spectralquant.model_folder import find_calibration, fingerprint_of_folder, missing_calibration
from spectralquant.profile import Profile, load_profile

CAUSAL = [family for family in FAMILIES if family.model.endswith(("ForCausalLM", "LMHeadModel"))]
READ = {"Llama 2", "Qwen3", "Gemma 3", "Phi-3, Phi-4", "GPT-2", "OPT", "Falcon", "BLOOM", "MPT", "OLMo 2", "GLM-4", "Mamba"}
"""Families that transformers saves as its own parameters are, in every release."""


def save_tied(folder: Path, tied: bool = True) -> PreTrainedModel:
    config = deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


def change(folder: Path, edit: Any) -> None:
    """Rewrite the weights in `folder` as `edit` leaves them."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def profile(llama_calibration: Path) -> Profile:
    return load_profile(llama_calibration)


@pytest.mark.parametrize("family", CAUSAL, ids=lambda f: f.name)
def test_fingerprint_is_that_of_the_loaded_model(family: Family, tmp_path: Path) -> None:
    """Or it says that weights are not known, where the file has other names or shapes; never other weights."""
    family.build().save_pretrained(tmp_path)
    want, got = fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)), fingerprint_of_folder(tmp_path)
    assert got == want or (family.name not in READ and got == {**want, "weights": None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", ["50GB", "40KB"], ids=["whole", "sharded"])
def test_dtypes_and_shards_share_a_fingerprint(dtype: torch.dtype, size: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    tiny_model("llama", dtype).save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or size == "50GB"
    assert fingerprint_of_folder(tmp_path) == fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == fingerprint(llama)


def test_weights_are_not_materialized(llama: PreTrainedModel, model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_: pytest.fail("the weights are loaded"))
    assert fingerprint_of_folder(model_folder) == fingerprint(llama)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied(tied: bool, tmp_path: Path) -> None:
    model = save_tied(tmp_path, tied)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert fingerprint_of_folder(tmp_path) == fingerprint(model)


@pytest.mark.parametrize("both", [True, False], ids=["both names", "the other name"])
def test_tied_weights_under_another_name(both: bool, tmp_path: Path) -> None:
    want = fingerprint(save_tied(tmp_path))

    def edit(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = (tensors["model.embed_tokens.weight"] if both else tensors.pop("model.embed_tokens.weight")).clone()

    change(tmp_path, edit)
    assert fingerprint_of_folder(tmp_path) == want


def test_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    model = save_tied(tmp_path)
    model.base_model.save_pretrained(tmp_path / "base")
    model.config.save_pretrained(tmp_path / "base")
    assert "embed_tokens.weight" in load_file(tmp_path / "base" / "model.safetensors")
    assert fingerprint_of_folder(tmp_path / "base") == fingerprint(model)


UNKNOWN = {
    "missing": lambda t: t.pop("model.norm.weight"),
    "shape": lambda t: t.update({"model.norm.weight": torch.ones(32)}),
    "tied in name only": lambda t: t.update({"lm_head.weight": -t["model.embed_tokens.weight"]}),
}


@pytest.mark.parametrize("edit", UNKNOWN.values(), ids=UNKNOWN)
def test_weights_that_cannot_be_known(edit: Any, tmp_path: Path) -> None:
    want = fingerprint(save_tied(tmp_path))
    change(tmp_path, edit)
    assert fingerprint_of_folder(tmp_path) == {**want, "weights": None}


def test_quantized_and_foreign_files_have_unknown_weights(tmp_path: Path) -> None:
    want = {**fingerprint(save_tied(tmp_path)), "weights": None}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert fingerprint_of_folder(tmp_path) == want
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert fingerprint_of_folder(tmp_path) == want


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json; expected a model as save_pretrained writes it"):
        fingerprint_of_folder(tmp_path)
    save_tied(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match=rf"the model in {tmp_path} can't be read"):
        fingerprint_of_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ConfigError, match="unheard-of"):
        fingerprint_of_folder(tmp_path)


def test_beside_the_model_comes_first(profile: Profile, tmp_path: Path, calibrations: Path) -> None:
    save_tiny_model(tmp_path / "model")
    known = fingerprint_of_folder(tmp_path / "model")
    assert find_calibration(tmp_path / "model", known) is None
    kept = profile.save(calibrations / "kept")
    assert find_calibration(tmp_path / "model", known)[0] == kept
    beside = profile.save(tmp_path / "model" / "spectralquant" / "calibration")
    os.utime(beside, (0, 0))
    path, found = find_calibration(tmp_path / "model", known)
    assert path == beside and found.model == known


def test_newest_kept_of_this_model(profile: Profile, model_folder: str, calibrations: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another model's newer one is no cause for a warning; one that can't be read is."""
    other = replace(profile, model={**profile.model, "weights": "0"})
    nameless = replace(profile, model={})
    kept = {"nameless": nameless, "other": other, "short": profile, "changed": profile, "new": profile, "ancient": profile}
    for age, (name, content) in enumerate(kept.items()):
        path = content.save(calibrations / name)
        whole = path.read_bytes()
        path.write_bytes({"short": whole[:50], "changed": whole[:-8] + bytes(8)}.get(name, whole))  # the header of the latter is as it was
        os.utime(path, (1_000_000 - age,) * 2)
    found = find_calibration(model_folder, fingerprint_of_folder(model_folder))
    assert found[0].name == "new.safetensors"
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    assert "truncated or damaged" in caplog.text and "checksum" in caplog.text


def test_another_models_calibration_beside_it_is_passed_over(profile: Profile, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("llama", seed=1).save_pretrained(tmp_path)
    profile.save(tmp_path / "spectralquant" / "calibration")
    assert find_calibration(tmp_path, fingerprint_of_folder(tmp_path)) is None
    assert "made for another model (weights:" in caplog.text


def test_unknown_weights_are_not_compared(profile: Profile, tmp_path: Path, calibrations: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All else is, and the user is told."""
    known = {**profile.model, "weights": None}
    path = profile.save(calibrations / "kept")
    assert find_calibration(tmp_path, known)[0] == path
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "can't be known" in caplog.text
    assert find_calibration(tmp_path, {**known, "layers": 4}) is None
    with pytest.raises(ProfileError, match=r"another model \(layers: file has 3, model has 4\)"):
        profile.require_model({**known, "layers": 4})


def test_missing_calibration_says_how_to_make_one(tmp_path: Path, calibrations: Path) -> None:
    """The command that it names is one that makes it: the options are real, and what it writes is found."""
    folder = tmp_path / "my model"
    save_tiny_model(folder)
    known = fingerprint_of_folder(folder)
    text = str(missing_calibration(folder, known))
    assert f"no calibration of the model in {folder} (LlamaForCausalLM, 3 layers, weights {known['weights']})" in text and str(calibrations) in text
    command = text.split("make it once: ")[1].split(";")[0]
    assert main([*shlex.split(command)[1:], "--samples", "4", "--no-cache"]) == 0
    assert find_calibration(folder, known)[0] == folder / "spectralquant" / "calibration.safetensors"
