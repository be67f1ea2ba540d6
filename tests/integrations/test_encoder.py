"""The engine for encoders: calibration, application to one model, files, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import FAMILIES, outputs
from torch import Tensor, nn

from spectralquant.errors import CalibrationError, ConfigError, ProfileError, ShapeError, UnsupportedModelError
from spectralquant.integrations import EncoderEngine, ProjectionAdapter
from spectralquant.integrations.encoder import prefix_tokens


@pytest.fixture
def vit() -> Any:
    return FAMILIES["ViT"][0]().eval()


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    return [FAMILIES["ViT"][1]() for _ in range(2)]


def test_inputs_of_any_form_give_the_same(vit: Any, batches: list[dict[str, Tensor]]) -> None:
    pixels = [batch["pixel_values"] for batch in batches]
    forms = (batches, iter(batches), pixels, [(p,) for p in pixels], lambda model: [model(p) for p in pixels])
    profiles = []
    for inputs in forms:
        engine = EncoderEngine()
        assert engine.calibrate(vit, inputs) == {"modules": 2, "tokens": 6 * 145, "head_dims": [32]}
        profiles.append(engine.profile.layers[1].key.basis)
    assert all(torch.equal(p, profiles[0]) for p in profiles)


def test_only_the_model_it_is_applied_to_changes(vit: Any, batches: list[dict[str, Tensor]]) -> None:
    engine, other = EncoderEngine(), FAMILIES["ViT"][0]().eval()
    other.load_state_dict(vit.state_dict())
    engine.calibrate(vit, batches)
    (want,), before = outputs(vit, batches[0]), vit.config._attn_implementation
    engine.apply_to(vit)
    assert not torch.equal(outputs(vit, batches[0])[0], want) and torch.equal(outputs(other, batches[0])[0], want)
    with pytest.raises(ConfigError, match="remove_from"), EncoderEngine(bits=8).applied_to(vit):
        pass
    with pytest.raises(ConfigError, match="remove_from"):
        engine.calibrate(vit, batches)
    engine.remove_from(vit)
    engine.remove_from(vit)
    assert torch.equal(outputs(vit, batches[0])[0], want) and vit.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in vit.modules())


def test_calibration_and_faults_leave_the_model_as_it_was(vit: Any, batches: list[dict[str, Tensor]]) -> None:
    vit.train()
    frozen = vit.vit.layernorm
    frozen.eval()
    before = vit.config._attn_implementation
    with pytest.raises(ZeroDivisionError):
        EncoderEngine().calibrate(vit, (batches[0] if i else 1 / 0 for i in (1, 1, 0)))
    assert vit.training and vit.config._attn_implementation == before
    engine = EncoderEngine()
    engine.calibrate(vit, batches)
    assert vit.training and not frozen.training
    vit.eval()
    with pytest.raises(KeyError), engine.applied_to(vit):
        raise KeyError
    assert vit.config._attn_implementation == before


def test_save_and_load(vit: Any, batches: list[dict[str, Tensor]], tmp_path: Path) -> None:
    engine = EncoderEngine("standard")
    engine.calibrate(vit, batches)
    again = EncoderEngine("standard").load(engine.save(tmp_path / "vit"))
    results = []
    for each in (engine, again):
        with each.applied_to(vit):
            results.append(outputs(vit, batches[0])[0])
    assert torch.equal(*results)
    with pytest.raises(ProfileError, match="another model"):
        again.apply_to(FAMILIES["ViT"][0]())
    with pytest.raises(ProfileError, match="another model"):
        again.apply_to(FAMILIES["DINOv2"][0]())


def test_a_language_models_calibration_is_refused(llama_calibration: Path) -> None:
    with pytest.raises(ProfileError, match="not an encoder's"):
        EncoderEngine().load(llama_calibration)


@pytest.mark.parametrize("family", ["ViT", "Swin", "CLIP", "DINOv3", "Whisper"])
def test_prefix_tokens(family: str) -> None:
    assert prefix_tokens(FAMILIES[family][0]()) == {"ViT": 1, "CLIP": 1, "DINOv3": 5}.get(family, 0)


def test_padding_has_no_part_in_the_statistics() -> None:
    build, inputs = FAMILIES["ESM-2"]
    model, batch, engine, short = build().eval(), inputs(), EncoderEngine(), EncoderEngine()
    assert engine.calibrate(model, [batch])["tokens"] == int(batch["attention_mask"].sum())
    rows = [{k: v[i : i + 1, : int(n)] for k, v in batch.items()} for i, n in enumerate(batch["attention_mask"].sum(1))]
    short.calibrate(model, rows)
    torch.testing.assert_close(engine.profile.layers[1].value.mean, short.profile.layers[1].value.mean, rtol=1e-3, atol=1e-4)


class Plain(nn.Module):
    """Attention that does its own products, with projections of three or of one."""

    def __init__(self, fused: bool, dim: int = 32) -> None:
        super().__init__()
        self.heads, self.fused = 2, fused
        width = 2 * dim
        self.qkv = nn.Linear(width, 3 * width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        states = self.qkv(hidden).chunk(3, -1) if self.fused else (self.q(hidden), self.k(hidden), self.v(hidden))
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in states)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapter_serves_modules_of_ones_own(fused: bool) -> None:
    projections = ("qkv",) if fused else ("q", "k", "v")
    adapter = ProjectionAdapter("Plain", *projections, output="out", heads="heads")
    model, hidden, bias = nn.Sequential(Plain(fused)), torch.randn(3, 80, 64), torch.randn(1, 2, 80, 80)
    engine = EncoderEngine(bits=8, adapters=[adapter])
    engine.calibrate(model, lambda m: m[0](hidden, bias))
    want = model[0](hidden, bias)
    with engine.applied_to(model), torch.no_grad():
        got = model[0](hidden, bias)
    assert (got - want).norm() / want.norm() < 1e-2 and not torch.equal(got, want)
    assert torch.equal(model[0](hidden, bias), want)


def test_what_is_refused(vit: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="AttentionAdapter"):
        EncoderEngine().calibrate(nn.Sequential(Plain(True)), [torch.randn(3, 80, 64)])
    with pytest.raises(UnsupportedModelError, match="no attention was seen in this Sequential"):
        EncoderEngine().calibrate(nn.Sequential(nn.Linear(4, 4)), [torch.randn(3, 4)])
    with pytest.raises(CalibrationError, match="no batch"):
        EncoderEngine().calibrate(vit, [])
    with pytest.raises(CalibrationError, match="expected at least 128"):
        EncoderEngine(adapters=[ProjectionAdapter("Plain", "qkv", output="out", heads="heads")]).calibrate(nn.Sequential(Plain(True)), [torch.randn(1, 50, 64)])
    with pytest.raises(ShapeError, match="head_dim=8"):
        adapter = ProjectionAdapter("Plain", "qkv", output="out", heads="heads")
        EncoderEngine(adapters=[adapter]).calibrate(nn.Sequential(Plain(True, 8)), [torch.randn(9, 50, 16)])
    for call in (lambda: EncoderEngine().apply_to(vit), lambda: EncoderEngine().save("x")):
        with pytest.raises(CalibrationError, match="call calibrate"):
            call()


@pytest.mark.parametrize("arguments", [{"bits": 3}, {"bits": 16}, {"bits": 2.5}, {"exact_tokens": -1}, {"compression": "none"}], ids=str)
def test_arguments_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected|choose"):
        EncoderEngine(**arguments)
