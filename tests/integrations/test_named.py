"""The original's names: each calibrates from raw inputs and applies."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoders import FAMILIES, FoldingBlock, folding, outputs
from tiny_models import TinyTokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.esm.modeling_esmfold import EsmFoldAttention

import spectralquant.integrations as integrations
from spectralquant.engine import SpectralQuantEngine
from spectralquant.errors import ConfigError, UnsupportedModelError
from spectralquant.integrations import EncoderEngine, NotSupportedError


def as_pixels(images: list[Tensor], return_tensors: str) -> dict[str, Tensor]:
    assert return_tensors == "pt"
    return {"pixel_values": torch.stack(images)}


def as_ids(sequences: list[str], return_tensors: str, padding: bool) -> dict[str, Tensor]:
    ids = [torch.tensor([4 + ord(letter) % 20 for letter in sequence]) for sequence in sequences]
    joined = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1)
    return {"input_ids": joined, "attention_mask": (joined != 1).long()}


def as_waves(clips: list[Tensor], sampling_rate: int, return_tensors: str, padding: bool) -> dict[str, Tensor]:
    assert sampling_rate == 16_000
    return {"input_values": torch.stack(clips)}


DOMAINS: dict[str, tuple[str, Any, list[Any], tuple[Any, ...]]] = {
    "vit": ("ViT", as_pixels, list(torch.randn(5, 3, 48, 48)), ()),
    "videomae": ("VideoMAE", as_pixels, list(torch.randn(5, 4, 3, 24, 24)), ()),
    "esm": ("ESM-2", as_ids, ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLG"[:n] for n in (80, 60, 25, 70, 40)], ()),
    "audio": ("wav2vec2", as_waves, list(torch.randn(5, 4000)), (16_000,)),
}


READ = {
    "vit": lambda items: as_pixels(items, "pt"),
    "videomae": lambda items: as_pixels(items, "pt"),
    "esm": lambda items: as_ids(items, "pt", True),
    "audio": lambda items: as_waves(items, 16_000, "pt", True),
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_domain(domain: str) -> None:
    family, processor, items, more = DOMAINS[domain]
    model, batch = FAMILIES[family][0]().eval(), dict(READ[domain](items[:3]))
    calibrate, apply = getattr(integrations, f"calibrate_{domain}"), getattr(integrations, f"apply_to_{domain}")
    engine = calibrate(model, processor, items, *more, n_calib=4, batch_size=3, bits=8)
    want = outputs(model, batch)[0]
    assert apply(model, engine) is model
    got = outputs(model, batch)[0]
    engine.remove_from(model)
    assert 0 < (got - want).norm() / want.norm() < 1e-2
    with pytest.raises(ConfigError, match="n_calib"):
        calibrate(model, processor, items, *more, n_calib=0)


def test_batches_of_ones_own_need_no_processor() -> None:
    build, inputs = FAMILIES["ViT"]
    assert integrations.calibrate_vit(build(), None, [inputs()]).profile is not None


class InvariantPointAttention(nn.Module):
    pass


def test_alphafold() -> None:
    """Attention of OpenFold's kind is coded, its triangles' too; points are refused with the reason."""
    model, batch = FoldingBlock().eval(), folding()
    engine = integrations.calibrate_alphafold(model, lambda m: [m(**folding()) for _ in range(4)], bits=8)
    assert set(engine.profile.model["modules"]) == {"block.seq_attention", "block.tri_att_start.mha", "block.tri_att_end.mha"}
    want = outputs(model, batch)
    integrations.apply_to_alphafold_evoformer(model, engine)
    got = outputs(model, batch)
    engine.remove_from(model)
    assert all(0 < (a - b).norm() / b.norm() < 1e-2 for a, b in zip(got, want, strict=True))
    model.points = InvariantPointAttention()
    with pytest.raises(NotSupportedError, match="distances between points"):
        integrations.apply_to_alphafold(model, engine, skip_ipa=False)
    with pytest.raises(UnsupportedModelError, match="apply_to_alphafold_evoformer"):
        integrations.apply_to_alphafold_ipa(model, engine)


class MSABlock(nn.Module):
    """Evoformer's attention over an alignment [B, S, T, C]: along rows with pair bias, along columns, each under the alignment's mask [B, S, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = EsmFoldAttention(64, 64, 64, 32, 2), EsmFoldAttention(64, 64, 64, 32, 2)
        self.pair_bias = nn.Linear(16, 2, bias=False)
        with torch.no_grad():  # as they come, gates and last layers are zero
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, msa: Tensor, pairs: Tensor, mask: Tensor) -> Any:
        hidden = 1e9 * (mask - 1)
        row = self.rows(msa, msa, biases=[hidden[:, :, None, None, :], self.pair_bias(pairs).permute(0, 3, 1, 2)[:, None]])
        turned = (msa + row).transpose(1, 2)
        column = self.columns(turned, turned, biases=[hidden.transpose(1, 2)[:, :, None, None, :]]).transpose(1, 2)
        return SimpleNamespace(to_tuple=lambda: (row, column))


def test_rows_and_columns_of_an_alignment() -> None:
    torch.manual_seed(0)
    model, mask = MSABlock().eval(), torch.ones(2, 7, 24)
    mask[1, 5:], mask[:, :, 20:] = 0, 0
    batch = {"msa": torch.randn(2, 7, 24, 64), "pairs": torch.randn(2, 24, 24, 16), "mask": mask}
    engine = integrations.calibrate_alphafold(model, [batch], bits=8)
    assert engine.profile.model["modules"] == ["rows", "columns"]
    want = outputs(model, batch)
    integrations.apply_to_alphafold_evoformer(model, engine)
    got = outputs(model, batch)
    engine.remove_from(model)
    assert all(0 < (a - b).norm() / b.norm() < 1e-2 for a, b in zip(got, want, strict=True))


class Attention(nn.Module):
    """Stands for timm's: that package needs torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = 2, 32**-0.5
        self.qkv, self.proj, self.proj_drop = nn.Linear(64, 192), nn.Linear(64, 64), nn.Identity()
        self.q_norm, self.k_norm = nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
        out = (self.q_norm(q) * self.scale @ self.k_norm(k).mT).softmax(-1) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "__module__", "timm.layers.attention")
    model, engine, x = nn.Sequential(Attention()), EncoderEngine(bits=8), torch.randn(3, 70, 64)
    engine.calibrate(model, [x])
    with torch.no_grad():
        want = model(x)
        with engine.applied_to(model):
            got = model(x)
    assert 0 < (got - want).norm() / want.norm() < 1e-2


def test_names_for_language_models(engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer) -> None:
    prompt = "a few words " * 120
    assert integrations.apply_spectralquant_to_llama(llama, engine) is llama
    result = integrations.prefill_compress(engine, llama, tokenizer, prompt)
    cache, stats = integrations.compress_prefill_cache(engine, engine.collect_kv(llama, tokenizer, prompt), llama)
    assert stats["seq_len"] == cache.get_seq_length() == result["prompt_length"]
    out = integrations.generate_with_compressed_cache(engine, llama, tokenizer, prompt, max_new_tokens=3)
    assert SimpleNamespace(**out).stats["new_tokens"] == 3
