"""Our attention function and `scaled_dot_product_attention` over packed keys and values: masks and biases of every kind."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from spectralquant.attention.hf import dense_attention, spectral_attention
from spectralquant.codec.packed import LazyKV, PackedKV
from spectralquant.engine import SpectralQuantEngine

MODULE = nn.Module().eval()


@pytest.fixture
def packed(engine: SpectralQuantEngine, llama: PreTrainedModel) -> PackedKV:
    """Two sequences of 505 tokens in the first layer, without the mass that only our attention adds."""
    cache = engine.cache(llama)
    layer = cache.layers[0]
    layer.codec = replace(layer.codec, missing_mass=None)
    layer.update(*torch.randn(2, 2, 2, 500, 32))
    key, _ = layer.update(*torch.randn(2, 2, 2, 5, 32))
    return key.packed_kv


def lazy(kv: PackedKV) -> tuple[LazyKV, LazyKV]:
    return LazyKV(kv, "key"), LazyKV(kv, "value")


def masks(kv: PackedKV) -> dict[str, torch.Tensor]:
    causal = torch.ones(5, kv.length, dtype=torch.bool).tril(kv.length - 5).repeat(2, 1, 1, 1)
    causal[0, :, :, :37] = False
    floats = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    bias = -0.01 * torch.arange(kv.length).flip(0) * torch.tensor([1.0, 0.5, 0.25, 0.1])[:, None, None]
    return {"bool": causal, "float": floats, "infinite": torch.zeros(causal.shape).masked_fill(~causal, -torch.inf), "bias": bias + floats}


@pytest.mark.parametrize("kind", ["bool", "float", "infinite", "bias"])
@pytest.mark.parametrize("way", ["interface", "sdpa"])
def test_masks(packed: PackedKV, kind: str, way: str) -> None:
    """Codes are read under a mask that only hides; a bias decodes. Both give what PyTorch gives over decoded keys."""
    query, mask = torch.randn(2, 4, 5, 32), masks(packed)[kind]
    key, value = packed.dense("key").repeat_interleave(2, 1), packed.dense("value").repeat_interleave(2, 1)
    want = nn.functional.scaled_dot_product_attention(query, key, value, mask)
    with patch.object(PackedKV, "dense", side_effect=packed.dense, autospec=False) as dense:
        if way == "interface":
            got = spectral_attention(MODULE, query, *lazy(packed), mask)[0].transpose(1, 2)
        else:
            got = nn.functional.scaled_dot_product_attention(query, *lazy(packed), attn_mask=mask, enable_gqa=True)
    assert dense.call_count == (2 if kind == "bias" else 0)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_position_bias_is_added(packed: PackedKV) -> None:
    """As T5 hands it over, with any mask or none."""
    query, bias, kinds = torch.randn(2, 4, 5, 32), torch.randn(1, 4, 5, packed.length), masks(packed)
    key, value = packed.dense("key").repeat_interleave(2, 1), packed.dense("value").repeat_interleave(2, 1)
    later = torch.ones(5, packed.length, dtype=torch.bool).tril(packed.length - 5)
    for mask, hidden in ((kinds["bool"], kinds["float"]), (kinds["float"], kinds["float"]), (None, torch.zeros(later.shape).masked_fill(~later, -torch.inf))):
        want = nn.functional.scaled_dot_product_attention(query, key, value, bias + hidden)
        for states in (lazy(packed), (packed.dense("key"), packed.dense("value"))):
            got, _ = spectral_attention(MODULE, query, *states, mask, position_bias=bias)
            torch.testing.assert_close(got.transpose(1, 2), want, rtol=1e-3, atol=1e-3)


def test_sdpa_without_a_mask(packed: PackedKV) -> None:
    """All queries see all: one query reads codes, several decode."""
    key, value = packed.dense("key").repeat_interleave(2, 1), packed.dense("value").repeat_interleave(2, 1)
    for count in (1, 5):
        query = torch.randn(2, 4, count, 32)
        got = nn.functional.scaled_dot_product_attention(query, *lazy(packed), enable_gqa=True)
        torch.testing.assert_close(got, nn.functional.scaled_dot_product_attention(query, key, value), rtol=1e-3, atol=1e-3)
    assert dense_attention(MODULE, query, key, value, None, 0.0, None, None, None).shape == query.shape
