"""One tiny random model per family, from its configuration: what `tests/test_families.py` runs and `docs/models.md` lists."""

from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
import transformers
from packaging.version import Version
from tiny_models import TinyTokenizer
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant import SpectralQuantEngine, get_default_calibration_texts
from spectralquant.errors import SpectralQuantError

VOCABULARY = 199
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
WIDE: dict[str, Any] = {**GROUPED, "head_dim": 32}
"""head_dim is not hidden_size / num_attention_heads."""
WIDTH: dict[str, Any] = {**GROUPED, "hidden_size": 128}
"""For families without `head_dim`: 128 / 4."""
WINDOW = 64
MIXED = ["sliding_attention", "full_attention"]
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA: dict[str, Any] = {
    **SIZES, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
IMAGE_TOKEN = 190
MAMBA2: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 8, "mamba_chunk_size": 16}
ROPE = "rope_parameters" if Version(transformers.__version__).major >= 5 else "rope_scaling"
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "patch_size": 4}
GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 2048, "pad_token_id": 0, "eos_token_id": 2}


@dataclass(frozen=True, eq=False)
class Image:
    """An image of 16 tokens in a prompt. `pixels`: shape of one image's input; `grid`: whether its grid goes along (Qwen-VL)."""

    pixels: tuple[int, ...]
    grid: bool = False

    def put(self, tokens: Tensor) -> dict[str, Tensor]:
        tokens = tokens.masked_fill(tokens >= IMAGE_TOKEN, 3)
        tokens[:, 4], tokens[:, 5:21] = IMAGE_TOKEN + 1, IMAGE_TOKEN
        pixels = torch.randn(1, *self.pixels, generator=torch.Generator().manual_seed(0)).repeat(len(tokens), *[1] * len(self.pixels))
        if not self.grid:
            return {"input_ids": tokens, "pixel_values": pixels}
        grid = torch.tensor([[1, 8, 8]]).repeat(len(tokens), 1)
        given = {"input_ids": tokens, "pixel_values": pixels.flatten(0, 1), "image_grid_thw": grid}
        marks_images = "mm_token_type_ids" in signature(transformers.Qwen2_5_VLForConditionalGeneration.forward).parameters
        return {**given, "mm_token_type_ids": (tokens == IMAGE_TOKEN).long()} if marks_images else given


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models.

    Attributes:
        name: As people call it.
        model: Class of transformers.
        config: Class of its configuration, and what that is made from.
        sizes: The configuration.
        image: How images come in.
        since: Version of transformers from which it can follow up on a cache.
    """

    name: str
    model: str
    config: str
    sizes: dict[str, Any]

    image: Image | None = None
    since: str = "4.56"

    @property
    def available(self) -> bool:
        return hasattr(transformers, self.model) and Version(transformers.__version__) >= Version(self.since)

    def inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """A prompt [B, T], with an image where the family reads such."""
        return {"input_ids": tokens} if self.image is None else self.image.put(tokens)

    def build(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.sizes)
        return getattr(transformers, self.model)(config).eval()


# fmt: off
FAMILIES = [
    Family("Llama 2", "LlamaForCausalLM", "LlamaConfig", {**WIDE, "num_key_value_heads": 4}),
    Family("Llama 3, SmolLM2", "LlamaForCausalLM", "LlamaConfig", {**WIDE, "rope_theta": 500_000.0}),
    Family("Mistral", "MistralForCausalLM", "MistralConfig", {**WIDE, "sliding_window": None}),
    Family("Mistral 0.1", "MistralForCausalLM", "MistralConfig", {**WIDE, "sliding_window": WINDOW}),
    Family("Mixtral", "MixtralForCausalLM", "MixtralConfig", {**WIDE, **EXPERTS}),
    Family("Qwen2, Qwen2.5", "Qwen2ForCausalLM", "Qwen2Config", WIDTH),
    Family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", WIDE),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**WIDE, **EXPERTS}),
    Family("Qwen3-Next", "Qwen3NextForCausalLM", "Qwen3NextConfig", {**WIDE, **EXPERTS, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32}),
    Family("SmolLM3", "SmolLM3ForCausalLM", "SmolLM3Config", {**WIDTH, "no_rope_layers": [1, 0]}),
    Family("Gemma", "GemmaForCausalLM", "GemmaConfig", WIDE),
    Family("Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", {**WIDE, "sliding_window": WINDOW, "query_pre_attn_scalar": 32}),
    Family("Gemma 3", "Gemma3ForCausalLM", "Gemma3TextConfig", {**WIDE, "sliding_window": WINDOW, "layer_types": MIXED}),
    Family("Phi-1, Phi-2", "PhiForCausalLM", "PhiConfig", WIDTH),
    Family("Phi-3, Phi-4", "Phi3ForCausalLM", "Phi3Config", WIDTH),
    Family("Phi-4-mini", "Phi3ForCausalLM", "Phi3Config", {**WIDTH, "partial_rotary_factor": 0.75, "head_dim": 32}),
    Family("GPT-2", "GPT2LMHeadModel", "GPT2Config", GPT2),
    Family("OPT", "OPTForCausalLM", "OPTConfig", {**SIZES, "hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 96}),
    Family("GPT-NeoX, Pythia", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, "hidden_size": 128}),
    Family("GPT-J", "GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 16}),
    Family("GPT-Neo", "GPTNeoForCausalLM", "GPTNeoConfig", {"vocab_size": VOCABULARY, "hidden_size": 128, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 2048, "window_size": WINDOW, "pad_token_id": 0, "eos_token_id": 2}),
    Family("GPT-BigCode, StarCoder", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2),
    Family("StarCoder2", "Starcoder2ForCausalLM", "Starcoder2Config", {**WIDTH, "sliding_window": None}),
    Family("Falcon", "FalconForCausalLM", "FalconConfig", {**SIZES, "hidden_size": 128}),
    Family("Falcon 40B", "FalconForCausalLM", "FalconConfig", {**SIZES, "hidden_size": 128, "new_decoder_architecture": True, "num_kv_heads": 2}),
    Family("Falcon-RW (ALiBi)", "FalconForCausalLM", "FalconConfig", {**SIZES, "hidden_size": 128, "alibi": True, "multi_query": False}),
    Family("BLOOM", "BloomForCausalLM", "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 128, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "eos_token_id": 2}),
    Family("MPT", "MptForCausalLM", "MptConfig", {"vocab_size": VOCABULARY, "d_model": 128, "n_layers": 2,
        "n_heads": 4, "max_seq_len": 2048, "pad_token_id": 0, "eos_token_id": 2}),
    Family("Cohere Command-R", "CohereForCausalLM", "CohereConfig", WIDTH),
    Family("Cohere Command-R7B", "Cohere2ForCausalLM", "Cohere2Config", {**WIDTH, "sliding_window": WINDOW, "layer_types": MIXED}),
    Family("OLMo", "OlmoForCausalLM", "OlmoConfig", WIDTH),
    Family("OLMo 2", "Olmo2ForCausalLM", "Olmo2Config", WIDTH),
    Family("Granite", "GraniteForCausalLM", "GraniteConfig", WIDTH),
    Family("StableLM", "StableLmForCausalLM", "StableLmConfig", WIDTH),
    Family("GLM-4", "GlmForCausalLM", "GlmConfig", WIDE),
    Family("gpt-oss", "GptOssForCausalLM", "GptOssConfig", {**WIDE, **EXPERTS, "sliding_window": WINDOW, "layer_types": MIXED}),
    Family("DeepSeek-V2", "DeepseekV2ForCausalLM", "DeepseekV2Config", {**MLA, "v_head_dim": 32}),
    Family("DeepSeek-V3", "DeepseekV3ForCausalLM", "DeepseekV3Config", {**MLA, "v_head_dim": 32}),
    Family("Mamba", "MambaForCausalLM", "MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    Family("Jamba", "JambaForCausalLM", "JambaConfig", {**WIDTH, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    Family("Falcon-H1", "FalconH1ForCausalLM", "FalconH1Config", {**WIDE, "mamba_d_ssm": 64, "mamba_n_heads": 4,
        "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}),
    Family("Llama 4 (text)", "Llama4ForCausalLM", "Llama4TextConfig", {**WIDE, **EXPERTS, "intermediate_size_mlp": 96, "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 0]}),
    Family("OLMo 3", "Olmo3ForCausalLM", "Olmo3Config", {**WIDTH, "sliding_window": WINDOW, "layer_types": MIXED}),
    Family("EXAONE 4", "Exaone4ForCausalLM", "Exaone4Config", {**WIDTH, "sliding_window": WINDOW, "layer_types": MIXED}),
    Family("GLM-4.5", "Glm4MoeForCausalLM", "Glm4MoeConfig",
        {**WIDE, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    Family("ERNIE 4.5", "Ernie4_5ForCausalLM", "Ernie4_5Config", WIDE),
    Family("Seed-OSS", "SeedOssForCausalLM", "SeedOssConfig", WIDE),
    Family("MiniMax-M2", "MiniMaxM2ForCausalLM", "MiniMaxM2Config", {**WIDE, **EXPERTS}),
    Family("Phi-3.5-MoE", "PhimoeForCausalLM", "PhimoeConfig", {**WIDTH, **EXPERTS}),
    Family("Nemotron", "NemotronForCausalLM", "NemotronConfig", WIDTH),
    Family("CodeGen", "CodeGenForCausalLM", "CodeGenConfig", {**GPT2, "rotary_dim": 16}),
    Family("Gemma 4 (smaller heads)", "Gemma4ForCausalLM", "Gemma4TextConfig", {**WIDE, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": MIXED * 2, "sliding_window": WINDOW, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 64}),
    Family("Gemma 4 (as released)", "Gemma4ForCausalLM", "Gemma4TextConfig", {**WIDE, "layer_types": MIXED, "sliding_window": WINDOW,
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 512}),
    Family("Qwen3.5", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**WIDE, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}),
    Family("Granite 4 (hybrid)", "GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", {**WIDTH, **EXPERTS, **MAMBA2, "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 32}),
    Family("Bamba", "BambaForCausalLM", "BambaConfig", {**WIDTH, **MAMBA2, "attn_layer_indices": [1]}),
    Family("LFM2", "Lfm2ForCausalLM", "Lfm2Config", {**WIDTH, "layer_types": ["conv", "full_attention"]}),
    Family("RecurrentGemma", "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig",
        {**WIDTH, "lru_width": 128, "attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]}),
    Family("JetMoe", "JetMoeForCausalLM", "JetMoeConfig", {**WIDTH, **EXPERTS, "kv_channels": 32}),
    Family("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"text_config": {**WIDTH, ROPE: {"rope_type": "default", "type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 1e4}},
         "vision_config": {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 128, "spatial_merge_size": 2, "window_size": 16,
             "fullatt_block_indexes": [0]},
         "image_token_id": IMAGE_TOKEN, "vision_start_token_id": IMAGE_TOKEN + 1, "vision_end_token_id": 192, "video_token_id": 193},
        Image((64, 96), grid=True), since="4.57"),
    Family("LLaVA", "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {**WIDTH, "model_type": "llama"},
         "vision_config": {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16},
         "image_token_index": IMAGE_TOKEN, "image_seq_length": 16, "vision_feature_layer": -1},
        Image((3, 16, 16))),
    Family("T5", "T5ForConditionalGeneration", "T5Config", {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 4}),
    Family("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", {"vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "begin_suppress_tokens": None}),
]
# fmt: on
FAMILIES = [family for family in FAMILIES if family.available]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A calibrated model and the engine that calibrated it."""

    family: Family
    model: PreTrainedModel
    engine: SpectralQuantEngine


@cache
def prepare(family: Family) -> "Prepared | SpectralQuantError":
    """Build and calibrate; or what the engine says against it."""
    model, engine = family.build(), SpectralQuantEngine(quantizer="uniform")
    try:
        engine.calibrate(model, TinyTokenizer(), get_default_calibration_texts(4), progress=False)
    except SpectralQuantError as refusal:
        return refusal
    return Prepared(family, model, engine)
