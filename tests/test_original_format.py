"""Calibration pairs of the original package."""

import json
from pathlib import Path

import pytest
import synthetic
import torch
from tiny_models import TinyTokenizer
from transformers import PreTrainedModel

from spectralquant import SpectralQuantEngine
from spectralquant.errors import ProfileError, ShapeError


def write_pair(stem: Path, layers: int, heads: int, dim: int) -> Path:
    tensors, meta = {}, []
    for layer in range(layers):
        for kind in ("key", "value"):
            made = synthetic.side(heads, dim, seed=layer)
            for head in range(heads):
                tag = f"L{layer}_H{head}_{kind}"
                tensors[f"{tag}_eval"], tensors[f"{tag}_evec"] = made.variance[head], made.basis[head]
                meta.append({"layer_idx": layer, "head_idx": head, "head_type": kind, "n_samples": 500, "head_dim": dim})
    torch.save(tensors, f"{stem}.pt")
    Path(f"{stem}_meta.json").write_text(json.dumps(meta))
    return stem


def shape_of(model: PreTrainedModel) -> tuple[int, int, int]:
    config = model.config
    return config.num_hidden_layers, config.num_key_value_heads, config.head_dim


@pytest.mark.parametrize("suffix", ["", ".pt"])
def test_a_pair_is_loaded_and_used(llama: PreTrainedModel, tokenizer: TinyTokenizer, tmp_path: Path, suffix: str) -> None:
    stem = write_pair(tmp_path / "old", *shape_of(llama))
    engine = SpectralQuantEngine()
    with pytest.warns(UserWarning, match="calibrate again and save it"):
        profile = engine.load_calibration(f"{stem}{suffix}")
    torch.testing.assert_close(profile.layers[1].value.variance, synthetic.side(*shape_of(llama)[1:], seed=1).variance)
    assert engine.is_calibrated(llama)
    out = engine.generate(llama, tokenizer, "word " * 300, max_new_tokens=4)
    assert out["stats"]["new_tokens"] == 4 and out["stats"]["n_layers"] == llama.config.num_hidden_layers
    assert engine.profile_of(llama) is profile


def test_a_pair_does_not_replace_a_real_calibration(llama: PreTrainedModel, llama_calibration: Path, tmp_path: Path) -> None:
    engine = SpectralQuantEngine()
    real = engine.load_calibration(llama_calibration)
    with pytest.warns(UserWarning):
        engine.load_calibration(write_pair(tmp_path / "old", *shape_of(llama)))
    assert engine.profile_of(llama) is real


def test_a_pair_of_other_shapes_is_refused(llama: PreTrainedModel, tokenizer: TinyTokenizer, tmp_path: Path) -> None:
    layers, heads, dim = shape_of(llama)
    engine = SpectralQuantEngine()
    with pytest.warns(UserWarning):
        engine.load_calibration(write_pair(tmp_path / "old", layers, heads + 1, dim))
    with pytest.raises(ShapeError, match="calibrate this model"):
        engine.generate(llama, tokenizer, "word", max_new_tokens=2)


def damage(stem: Path, kind: str) -> None:
    weights, meta = Path(f"{stem}.pt"), Path(f"{stem}_meta.json")
    tensors = torch.load(weights)
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
        return
    if kind == "no meta":
        meta.unlink()
        return
    if kind == "meta":
        meta.write_text("{")
        return
    if kind == "missing head":
        meta.write_text(json.dumps([r for r in json.loads(meta.read_text()) if r["head_idx"]]))
        return
    change = {"nan": lambda t: t * torch.nan, "shape": lambda t: t[:-1]}[kind]
    tensors["L0_H0_key_eval"] = change(tensors["L0_H0_key_eval"])
    torch.save(tensors, weights)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("truncated", "no readable"),
        ("no meta", "does not exist"),
        ("meta", "no readable"),
        ("missing head", "without gaps"),
        ("nan", "not finite"),
        ("shape", "different sizes"),
    ],
)
def test_a_damaged_pair_is_refused(tmp_path: Path, kind: str, text: str) -> None:
    stem = write_pair(tmp_path / "old", 2, 2, 32)
    damage(stem, kind)
    with pytest.raises(ProfileError, match=text):
        SpectralQuantEngine().load_calibration(stem)
