"""Vision, video, protein and audio encoders with attention on coded keys and values, and the original's names for language models. docs/encoders.md"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectralquant.errors import NotSupportedError as NotSupportedError
    from spectralquant.integrations.adapters import ProjectionAdapter as ProjectionAdapter
    from spectralquant.integrations.audio import apply_to_audio as apply_to_audio
    from spectralquant.integrations.audio import calibrate_audio as calibrate_audio
    from spectralquant.integrations.calls import AttentionAdapter as AttentionAdapter
    from spectralquant.integrations.calls import AttentionCall as AttentionCall
    from spectralquant.integrations.comparison import Comparison as Comparison
    from spectralquant.integrations.encoder import EncoderEngine as EncoderEngine
    from spectralquant.integrations.language import apply_spectralquant_to_llama as apply_spectralquant_to_llama
    from spectralquant.integrations.language import apply_spectralquant_to_mistral as apply_spectralquant_to_mistral
    from spectralquant.integrations.language import apply_spectralquant_to_model as apply_spectralquant_to_model
    from spectralquant.integrations.language import apply_spectralquant_to_qwen as apply_spectralquant_to_qwen
    from spectralquant.integrations.language import compress_prefill_cache as compress_prefill_cache
    from spectralquant.integrations.language import generate_with_compressed_cache as generate_with_compressed_cache
    from spectralquant.integrations.language import prefill_compress as prefill_compress
    from spectralquant.integrations.protein import apply_to_alphafold as apply_to_alphafold
    from spectralquant.integrations.protein import apply_to_alphafold_evoformer as apply_to_alphafold_evoformer
    from spectralquant.integrations.protein import apply_to_alphafold_ipa as apply_to_alphafold_ipa
    from spectralquant.integrations.protein import apply_to_esm as apply_to_esm
    from spectralquant.integrations.protein import calibrate_alphafold as calibrate_alphafold
    from spectralquant.integrations.protein import calibrate_esm as calibrate_esm
    from spectralquant.integrations.video import apply_to_videomae as apply_to_videomae
    from spectralquant.integrations.video import calibrate_videomae as calibrate_videomae
    from spectralquant.integrations.vision import apply_to_vit as apply_to_vit
    from spectralquant.integrations.vision import calibrate_vit as calibrate_vit

# Nothing is imported before it is used: a server loads `integrations.vllm` in every process, and has no encoders.
_LAZY = {
    "NotSupportedError": "spectralquant.errors",
    "ProjectionAdapter": "spectralquant.integrations.adapters",
    "apply_to_audio": "spectralquant.integrations.audio",
    "calibrate_audio": "spectralquant.integrations.audio",
    "AttentionAdapter": "spectralquant.integrations.calls",
    "AttentionCall": "spectralquant.integrations.calls",
    "Comparison": "spectralquant.integrations.comparison",
    "EncoderEngine": "spectralquant.integrations.encoder",
    "apply_spectralquant_to_llama": "spectralquant.integrations.language",
    "apply_spectralquant_to_mistral": "spectralquant.integrations.language",
    "apply_spectralquant_to_model": "spectralquant.integrations.language",
    "apply_spectralquant_to_qwen": "spectralquant.integrations.language",
    "compress_prefill_cache": "spectralquant.integrations.language",
    "generate_with_compressed_cache": "spectralquant.integrations.language",
    "prefill_compress": "spectralquant.integrations.language",
    "apply_to_alphafold": "spectralquant.integrations.protein",
    "apply_to_alphafold_evoformer": "spectralquant.integrations.protein",
    "apply_to_alphafold_ipa": "spectralquant.integrations.protein",
    "apply_to_esm": "spectralquant.integrations.protein",
    "calibrate_alphafold": "spectralquant.integrations.protein",
    "calibrate_esm": "spectralquant.integrations.protein",
    "apply_to_videomae": "spectralquant.integrations.video",
    "calibrate_videomae": "spectralquant.integrations.video",
    "apply_to_vit": "spectralquant.integrations.vision",
    "calibrate_vit": "spectralquant.integrations.vision",
}
__all__ = [
    "AttentionAdapter",
    "AttentionCall",
    "Comparison",
    "EncoderEngine",
    "NotSupportedError",
    "ProjectionAdapter",
    "apply_spectralquant_to_llama",
    "apply_spectralquant_to_mistral",
    "apply_spectralquant_to_model",
    "apply_spectralquant_to_qwen",
    "apply_to_alphafold",
    "apply_to_alphafold_evoformer",
    "apply_to_alphafold_ipa",
    "apply_to_audio",
    "apply_to_esm",
    "apply_to_videomae",
    "apply_to_vit",
    "calibrate_alphafold",
    "calibrate_audio",
    "calibrate_esm",
    "calibrate_videomae",
    "calibrate_vit",
    "compress_prefill_cache",
    "generate_with_compressed_cache",
    "prefill_compress",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'spectralquant.integrations' has no attribute {name!r}")
