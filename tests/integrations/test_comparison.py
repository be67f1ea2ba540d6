"""What `EncoderEngine.compare` says, against its formulas, and what it refuses."""

from typing import Any

import pytest
import torch
from encoders import FAMILIES, outputs
from torch import Tensor, nn
from transformers import ViTForImageClassification

from spectralquant.errors import CalibrationError, ConfigError
from spectralquant.integrations import Comparison, EncoderEngine
from spectralquant.integrations.comparison import compare_outputs, main_output


@pytest.fixture
def vit() -> Any:
    model = FAMILIES["ViT"][0]().eval()
    return model if isinstance(model, ViTForImageClassification) else ViTForImageClassification(model.config).eval()


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    return [FAMILIES["ViT"][1]() for _ in range(2)]


def test_figures_are_those_of_the_outputs(vit: Any, batches: list[dict[str, Tensor]]) -> None:
    engine = EncoderEngine("high")
    engine.calibrate(vit, batches)
    with torch.no_grad():
        want = torch.cat([vit(**b).logits for b in batches]).double()
        with engine.applied_to(vit):
            got = torch.cat([vit(**b).logits for b in batches]).double()
    found = engine.compare(vit, iter(batches))
    p, log_ratio = want.softmax(-1), want.log_softmax(-1) - got.log_softmax(-1)
    assert (found.output, found.vectors) == ("logits", len(want))
    assert found.relative_error == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-9) and found.relative_error > 0
    assert found.kl == pytest.approx(float((p * log_ratio).sum(-1).mean()), rel=1e-6)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(want, got, dim=-1).mean()), rel=1e-9)
    assert found.same_class == float((want.argmax(-1) == got.argmax(-1)).double().mean())
    assert "KL" in str(found) and f"{len(want)} vectors of logits" in str(found)
    assert engine.compare(vit, lambda model: model(batches[0]["pixel_values"])).vectors == len(batches[0]["pixel_values"])


def test_the_model_is_left_as_it_was(vit: Any, batches: list[dict[str, Tensor]]) -> None:
    engine = EncoderEngine(bits=8)
    engine.calibrate(vit, batches)
    want = outputs(vit, batches[0])[0]
    vit.train()
    engine.compare(vit, batches)
    assert vit.training
    assert torch.equal(outputs(vit.eval(), batches[0])[0], want)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"bits": 8}, {"compression": "high"}])
def test_a_gpu_gives_what_the_processor_gives(vit: Any, batches: list[dict[str, Tensor]], options: dict[str, Any]) -> None:
    engine = EncoderEngine(**options)
    engine.calibrate(vit, batches)
    with engine.applied_to(vit):
        want = outputs(vit, batches[0])[0]
    vit.cuda()
    on_gpu = EncoderEngine(**options)
    on_gpu.calibrate(vit, batches)
    plain = vit(batches[0]["pixel_values"].cuda()).logits
    with on_gpu.applied_to(vit), torch.no_grad():
        got = vit(batches[0]["pixel_values"].cuda()).logits
    assert not torch.equal(got, plain)
    assert (got.cpu() - want).norm() < 2e-2 * want.norm()
    assert on_gpu.compare(vit, batches).relative_error == pytest.approx(engine.compare(vit.cpu(), batches).relative_error, rel=0.3)


def test_padding_does_not_count() -> None:
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    name, vectors = main_output({"attention_mask": mask}, {"last_hidden_state": hidden})
    assert name == "last_hidden_state" and torch.equal(vectors, torch.stack([hidden[0, 0], hidden[0, 1], hidden[1, 0]]).double())
    assert len(main_output({"attention_mask": torch.ones(2, 9)}, {"last_hidden_state": hidden})[1]) == 6  # a mask of samples, not of tokens
    assert main_output(None, (hidden[0],))[1].shape == (3, 4) and main_output(None, hidden)[0] == "0"


def test_equal_outputs_have_no_error() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    assert compare_outputs([(x, x)], "logits") == Comparison("logits", 5, pytest.approx(1.0), 0.0, 0.0, 1.0)
    assert compare_outputs([(x, 2 * x)], "pooler_output") == Comparison("pooler_output", 5, pytest.approx(1.0), pytest.approx(1.0), None, None)


def test_what_cannot_be_compared_is_refused(vit: Any, batches: list[dict[str, Tensor]]) -> None:
    engine = EncoderEngine()
    with pytest.raises(CalibrationError, match="calibrate"):
        engine.compare(vit, batches)
    engine.calibrate(vit, batches)
    with pytest.raises(ConfigError, match="no batch"):
        engine.compare(vit, [])
    with engine.applied_to(vit), pytest.raises(ConfigError, match="remove_from"):
        engine.compare(vit, batches)
    with pytest.raises(ConfigError, match="no floating-point tensor"):
        main_output(None, torch.arange(3))


def test_models_that_are_no_transformers_are_compared_too() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.qkv, self.out = 2, nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, hidden: Tensor) -> Tensor:
            q, k, v = (x.unflatten(-1, (2, 32)).transpose(1, 2) for x in self.qkv(hidden).chunk(3, -1))
            return self.out(((q @ k.mT * 32**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))

    from spectralquant.integrations import ProjectionAdapter

    torch.manual_seed(0)
    model, x = Plain(), torch.randn(4, 100, 64)
    engine = EncoderEngine(bits=8, adapters=[ProjectionAdapter("Plain", "qkv", output="out")])
    engine.calibrate(model, [x])
    assert 0 < engine.compare(model, [x]).relative_error < 1e-2
