"""Tiny random encoders of every family, and inputs for them. Head size 32 everywhere."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn
from transformers.models.esm.configuration_esm import TrunkConfig
from transformers.models.esm.modeling_esmfold import EsmFoldTriangularSelfAttentionBlock

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 96}
IMAGE: dict[str, Any] = {"image_size": 48, "patch_size": 4}
SWIN: dict[str, Any] = {"embed_dim": 32, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 32, "patch_size": 2}


def pixels(size: int = 48) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(3, 3, size, size)}


def clips(frames: int, size: int = 24) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(3, frames, 3, size, size)}


def proteins() -> dict[str, Tensor]:
    """Of different lengths, padded on the right."""
    ids, mask = torch.randint(4, 24, (4, 60)), torch.ones(4, 60, dtype=torch.int64)
    mask[1, 40:] = mask[2, 25:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def sam() -> nn.Module:
    config = t.SamVisionConfig(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=3, output_channels=16, image_size=64, patch_size=4, window_size=5, global_attn_indexes=[1],
        mlp_dim=96, initializer_range=0.1,
    )  # fmt: skip
    return t.SamVisionModel(config)


class FoldingBlock(nn.Module):
    """A block of ESMFold's trunk: attention over the sequence with pair bias, and over triangles of pairs from both ends."""

    def __init__(self) -> None:
        super().__init__()
        trunk = TrunkConfig(num_blocks=1, sequence_state_dim=64, pairwise_state_dim=64, structure_module={})
        self.block = EsmFoldTriangularSelfAttentionBlock(trunk)
        with torch.no_grad():  # as they come, biases and last layers are zero
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, sequence: Tensor, pairs: Tensor, mask: Tensor) -> Any:
        out = self.block(sequence, pairs, mask)
        return SimpleNamespace(to_tuple=lambda: out)


def folding() -> dict[str, Tensor]:
    mask = torch.ones(4, 14)
    mask[1, 9:] = 0
    return {"sequence": torch.randn(4, 14, 64), "pairs": torch.randn(4, 14, 14, 64), "mask": mask}


def depth_anything() -> nn.Module:
    backbone = t.Dinov2Config(**SIZES, image_size=56, patch_size=14, out_features=["stage1", "stage2"], reshape_hidden_states=False, apply_layernorm=True)
    config = t.DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=64, neck_hidden_sizes=[16, 32], reassemble_factors=[2, 1], fusion_hidden_size=16,
        head_hidden_size=8,
    )  # fmt: skip
    return t.DepthAnythingForDepthEstimation(config)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "ViT": (lambda: t.ViTForImageClassification(t.ViTConfig(**SIZES, **IMAGE)), pixels()),
    "DeiT": (lambda: t.DeiTForImageClassification(t.DeiTConfig(**SIZES, **IMAGE)), pixels()),
    "DINOv2": (lambda: t.Dinov2Model(t.Dinov2Config(**SIZES, **IMAGE)), pixels()),
    "DINOv2 with registers": (lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**SIZES, **IMAGE, num_register_tokens=4)), pixels()),
    "DINOv3": (lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**SIZES, **IMAGE, num_register_tokens=4)), pixels()),
    "CLIP": (lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SIZES, **IMAGE)), pixels()),
    "SigLIP": (lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES, **IMAGE)), pixels()),
    "Swin": (lambda: t.SwinModel(t.SwinConfig(**SWIN)), pixels(32)),
    "SAM": (sam, lambda: {"pixel_values": torch.randn(2, 3, 64, 64)}),
    "Depth Anything": (depth_anything, pixels(56)),
    "VideoMAE": (lambda: t.VideoMAEModel(t.VideoMAEConfig(**SIZES, image_size=24, patch_size=4, num_frames=4)), clips(4)),
    "ViViT": (lambda: t.VivitModel(t.VivitConfig(**SIZES, image_size=24, tubelet_size=[2, 4, 4], num_frames=4)), clips(4)),
    "TimeSformer": (lambda: t.TimesformerModel(t.TimesformerConfig(**SIZES, image_size=24, patch_size=4, num_frames=4)), clips(4)),
    "ESM-2": (
        lambda: t.EsmForMaskedLM(t.EsmConfig(**SIZES, vocab_size=33, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary")),
        proteins,
    ),
    "ESMFold trunk": (FoldingBlock, folding),
    "Whisper": (
        lambda: t.models.whisper.modeling_whisper.WhisperEncoder(
            t.WhisperConfig(d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=96, num_mel_bins=16, max_source_positions=100)
        ),
        lambda: {"input_features": torch.randn(2, 16, 200)},
    ),
    "wav2vec2": (
        lambda: t.Wav2Vec2Model(t.Wav2Vec2Config(**SIZES, conv_dim=(16,) * 3, conv_stride=(5, 4, 4), conv_kernel=(10, 4, 4), num_feat_extract_layers=3)),
        lambda: {"input_values": torch.randn(2, 8000)},
    ),
}  # fmt: skip


def build(family: str) -> Any:
    """In evaluation mode; tokens and positions that begin as zeros are not zero."""
    model = FAMILIES[family][0]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() and not name.endswith(".bias"):
                parameter.normal_(0.0, 0.1)
    return model


def outputs(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [x for x in model(**batch).to_tuple() if isinstance(x, Tensor)]
