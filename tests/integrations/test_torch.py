"""`torch.nn.MultiheadAttention`, alone and inside PyTorch's own layers, whose fused paths pass it by."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectralquant.errors import UnsupportedModelError
from spectralquant.integrations import EncoderEngine
from spectralquant.integrations.adapters import TorchAdapter

BATCH, LENGTH, WIDTH, HEADS = 6, 90, 64, 2


def shown(x: Tensor, batch_first: bool) -> Tensor:
    return x if batch_first else x.transpose(0, 1)


def difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_transformer_encoder(batch_first: bool, padded: bool) -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    padding = torch.arange(LENGTH) >= torch.tensor([90, 50, 80, 90, 33, 70])[:, None] if padded else None
    nested = model.use_nested_tensor

    def run(each: Any) -> Tensor:
        out = shown(each(shown(x, batch_first), src_key_padding_mask=padding), batch_first)
        return out if padding is None else out[~padding[:, : out.shape[1]]]

    want = run(model)
    engine = EncoderEngine(bits=8)
    assert engine.calibrate(model, run)["modules"] == 2
    with engine.applied_to(model):
        got = run(model)
        assert not model.use_nested_tensor
    assert 0 < difference(got, want) < 1e-2
    assert torch.equal(run(model), want) and model.use_nested_tensor == nested
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 48, "vdim": 40}])
def test_calls_are_what_the_module_computes(mask: str, options: dict[str, Any]) -> None:
    """The dense result of the adapter's call, without any code, is the module's."""
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options).eval()
    query = torch.randn(3, 20, WIDTH)
    key, value = torch.randn(3, 30, options.get("kdim", WIDTH)), torch.randn(3, 30, options.get("vdim", WIDTH))
    masks = {"none": None, "bool": torch.rand(20, 30) > 0.7, "float": torch.randn(20, 30), "per head": torch.randn(3 * HEADS, 20, 30)}
    arguments: dict[str, Any] = {"attn_mask": masks[mask], "need_weights": False}
    if mask != "none":
        padding = torch.arange(30) >= torch.tensor([30, 12, 25])[:, None]
        arguments["key_padding_mask"] = torch.zeros(3, 30).masked_fill(padding, -torch.inf) if mask != "bool" else padding
    want = module(query, key, value, **arguments)[0]
    adapter = TorchAdapter()
    assert adapter.takes(module)
    got, weights = adapter.result(module, adapter.call(module, query, key, value, **arguments).dense(), query, key, value, **arguments)
    assert weights is None and difference(got, want) < 1e-5


@torch.no_grad()
def test_one_sequence_without_a_batch() -> None:
    module, adapter, x = nn.MultiheadAttention(WIDTH, HEADS).eval(), TorchAdapter(), torch.randn(20, WIDTH)
    got, _ = adapter.result(module, adapter.call(module, x, x, x).dense(), x, x, x)
    assert got.shape == x.shape and difference(got, module(x, x, x)[0]) < 1e-5


def test_what_it_does_not_take_is_refused() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, batch_first=True)
    assert not TorchAdapter().takes(module) and not TorchAdapter().takes(nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True))
    x = torch.randn(4, 80, WIDTH)
    with pytest.raises(UnsupportedModelError, match="no attention was seen"):
        EncoderEngine().calibrate(nn.Sequential(module), lambda model: model[0](x, x, x))
