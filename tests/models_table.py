"""docs/models.md, written from what one tiny model of every family does: `python tests/models_table.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from model_families import FAMILIES, WINDOW, Prepared, prepare
from transformers import __version__

from spectralquant.attention import hf
from spectralquant.cache.layers import SpectralLayer
from spectralquant.codec.packed import PackedKV
from spectralquant.compat import cache_argument

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
PROMPT = 400
TEXT = """# Models

What this package does with models of transformers, family by family. The tables are written by `python tests/models_table.py` from runs with transformers
{version}: one tiny random model per family is calibrated, {prompt} tokens go into its cache, and one more token reads it. `tests/test_families.py` checks for
each that the logits are those of the model's own attention over the decoded keys and values, that nothing changes before anything is coded, that left-padded
rows equal single ones, and that this page is what a run gives. Tiny random models prove that shapes, masks, positions and caches fit. They say nothing about
quality.

- **packed**: attention reads the codes. Our function takes the place of the model's attention, or the model calls PyTorch's `scaled_dot_product_attention`.
- **decoded**: the model's own attention code reads keys and values, which are decoded for it at each step, one layer at a time. The cache is as small, but
  decoding costs time and the memory of one layer, and there are no CUDA graphs.
- **refused**: calibration raises `UnsupportedModelError` with the text in the last column (of the tiny model, whose sliding windows are of {window} tokens).

"Stays exact" lists what is not coded because it does not grow with the text. "Frame of keys" says whether the rotary embedding could be read: then keys are
coded in the anchored frame ([maths.md](maths.md)), else as they are stored.

| family | class | path | coded layers of the tiny model | stays exact | frame of keys |
|---|---|---|---|---|---|
{rows}

Refused:

| family | class | what the error says |
|---|---|---|
{refusals}

Before transformers 5.4, models with recurrent layers (Jamba, Falcon-H1, Bamba, Granite 4, LFM2, Qwen3-Next) bring caches of their own and are refused. Older
releases also decode for GPT-J, CodeGen and StableLM, and Qwen2.5-VL needs 4.57 (4.56 fails when a cache is followed up without positions). Models whose
attention does not use transformers' attention interface (BLOOM, MPT, GPT-Neo, Falcon, models with code of their own) are calibrated from the products of
queries with keys that their attention modules take.

Some releases fail with any cache, so with this one too: assisted decoding and prompt lookup where a model has sliding windows (before 5.15), an assistant with
sliding windows (5.16 and 5.17), `prefill_chunk_size` behind sliding windows (5.0 to 5.2: wrong logits without a word). `tests/generation` skips these by name.
Assisted decoding that goes on from a cache is wrong without a word in newer ones, 5.24 among them; here it reads the whole text anew instead, and says so.
`prefill_chunk_size` on a cache with tokens is wrong without a word before 5.23; here what comes behind the cache is read at once, with a warning.
"""


def render() -> str:
    rows, refusals = [], []
    for family in FAMILIES:
        prepared = prepare(family)
        if isinstance(prepared, Prepared):
            rows.append(_row(family.name, f"`{family.model}`", *run(prepared)))
        else:
            refusals.append(_row(family.name, f"`{family.model}`", str(prepared)))
    return TEXT.format(version=__version__, prompt=PROMPT, window=WINDOW, rows="\n".join(rows), refusals="\n".join(refusals))


@torch.no_grad()
def run(prepared: Prepared) -> tuple[str, str, str, str]:
    """Path, coded layers, what stays exact, frame of keys."""
    model, family = prepared.model, prepared.family
    cache = prepared.engine.cache(model)
    tokens = torch.randint(3, 180, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    argument: Any = cache_argument(model, cache)
    model(**family.inputs(tokens), use_cache=True, **argument)
    with counting() as counts:
        model(input_ids=tokens[:, :1], use_cache=True, **argument)
    prepared.engine.remove_from(model)
    path = "packed" if not counts["decoded"] else "decoded" if not counts["packed"] else "mixed"
    coded = cache.coded_layers
    exact = sorted({_kind(layer) for layer in cache.layers} - {""})
    frames = [layer.codec.frame is not None for layer in coded]
    frame = "anchored" if all(frames) else "as stored" if not any(frames) else "anchored where keys turn"
    return path, f"{len(coded)} of {len(cache.layers)}", ", ".join(exact) or "-", frame


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Count layers that attention reads as codes, and keys or values that are decoded."""
    counts = {"packed": 0, "decoded": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    with patch.object(hf, "attend_packed", counted("packed", hf.attend_packed)), patch.object(PackedKV, "dense", counted("decoded", PackedKV.dense)):
        yield counts


def _kind(layer: Any) -> str:
    """What of a layer is not coded, in words."""
    if hasattr(layer, "recurrent_states"):
        return "recurrent states"
    if isinstance(layer, SpectralLayer):
        return ""
    return "sliding-window layers" if getattr(layer, "is_sliding", False) else "layers that share another's keys"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
