"""The readers that `fuzz.py` tries: each makes a valid file, reads a mutated one, and uses what it got as the package does.

A reader is added to READERS in five lines:

    Reader(
        "prefix file",                       # as results and tables call it
        make_prefix,                         # writes a valid file into a folder, with what it needs beside it, and returns the file that is mutated
        lambda path: read_prefix(path),      # reads it; raises a SpectralQuantError, or returns what it holds
        lambda a, b: torch.equal(a.x, b.x),  # whether two of those are the same
        (edit_tensors,),                     # mutations that know the format, see `fuzz_mutations`; the blind ones come by themselves
        use=lambda held: held.attend(...),   # what is done with it afterwards: it may raise a SpectralQuantError, and nothing else
        sealed=True,                         # it has a checksum: a file that is read after a blind mutation holds what it held
    )

What `make` needs of a model or a profile should be tiny: a hundred thousand files are read in minutes then.
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fuzz_caches as caches
import torch
from fuzz_mutations import Mutation, edit_archive, edit_json, edit_tensors
from torch import Tensor, nn

from spectralquant.calibration.spectrum import spectral_basis
from spectralquant.cli.certificate import describe_certificate
from spectralquant.codec.budget import plane_counts
from spectralquant.codec.codec import build_codec, value_codebooks
from spectralquant.config import Dials
from spectralquant.evaluation.page.page import read_run, render
from spectralquant.evaluation.report import build_report
from spectralquant.evaluation.tasks.problems import read_problems
from spectralquant.evaluation.texts import read_text
from spectralquant.integrations.encoder import CHOICES as ENCODER_CHOICES
from spectralquant.integrations.encoder import EncoderEngine, _fingerprint
from spectralquant.model_folder import fingerprint_of_folder, without_weights
from spectralquant.original_format import load_original
from spectralquant.prefix_store.entries import Tail
from spectralquant.presets import PRESETS
from spectralquant.pretrained import describe
from spectralquant.profile import Choices, LayerProfile, Profile, SideProfile, load_profile, read_fingerprint
from spectralquant.rope import Rotary
from spectralquant.spectra import describe_heads

DIM, HEADS = 32, 1


@dataclass(frozen=True, slots=True)
class Reader:
    """See above."""

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    same: Callable[[Any, Any], bool]
    aware: tuple[Mutation, ...]
    use: Callable[[Any], Any] = lambda content: None
    sealed: bool = False
    slow: bool = False
    """A read takes so long that `fuzz.py` runs a hundredth of the files."""


def equal(a: Any, b: Any) -> bool:
    """Whether two values of dataclasses, tensors, lists, dictionaries and numbers are the same, NaN being itself."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


# Calibrations ---------------------------------------------------------------------------------------------------------


def side(seed: int) -> SideProfile:
    make = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=make, dtype=torch.float64))[0]
    basis, variance = spectral_basis((turn * torch.exp(-0.1 * torch.arange(DIM, dtype=torch.float64))) @ turn.mT, None)
    return SideProfile(torch.randn(HEADS, DIM, generator=make), basis.float(), variance.float())


def profile(choices: Choices, model: dict[str, Any], rotary: bool) -> Profile:
    """Two layers with all that a file may hold, codebooks and a certificate too."""
    layers: dict[int, LayerProfile] = {}
    for i in (0, 1):
        turn = Rotary(1e4 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))) if rotary else None
        layers[i] = LayerProfile(side(i), side(9 + i), torch.ones(HEADS), 12.0, turn, 1.0, 0.01, torch.full((HEADS, 2), 0.1))
    row = {"choices": dataclasses.asdict(choices), "changed": {"run": 0}, "kl": 0.02, "score": math.nan, "agreement": 0.9, "kept": True}
    measured = {"preset": "high", "quantizer": "joint", "windows": 2, "scored_tokens": 64, "kl": 0.01, "agreement": 0.95, "menu": [row, row]}
    made = Profile(layers, choices, model, {**measured, "tokens": 500, "seconds": 1.5, "corpus": "bundled"})
    value_codebooks(made, plane_counts(made, PRESETS["high"], Dials())[1])
    return made


def make_calibration(folder: Path) -> Path:
    model = {"architecture": "LlamaForCausalLM", "layers": 2, "hidden_size": 64, "query_heads": 2, "weights": "0f" * 16}
    return profile(Choices(), model, rotary=True).save(
        folder / "calibration",
    )


def use_profile(held: Profile) -> None:
    """As the command line and an engine do. Codebooks that the file lacks are not trained: that takes seconds, and reads nothing of it but variances."""
    describe(held), describe_certificate(held), describe_heads(held, PRESETS["high"])
    trained = plane_counts(held, PRESETS["high"], Dials())[1] in held.codebooks
    build_codec(held, PRESETS["high"], Dials(), quantizer="joint" if trained else "uniform")
    build_codec(held, PRESETS["ultra"], Dials(avg_bits=4), quantizer="lloyd-max")


@cache
def encoder_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def make_encoder(folder: Path) -> Path:
    return profile(ENCODER_CHOICES, _fingerprint(encoder_model(), ["0", "1"]), rotary=False).save(folder / "encoder")


def read_encoder(path: Path) -> Profile:
    engine = EncoderEngine().load(path)
    assert engine.profile is not None
    return engine.profile


def use_encoder(held: Profile) -> None:
    engine = EncoderEngine(bits=4)
    engine.profile = held
    engine.codecs(encoder_model())


def make_original(folder: Path) -> Path:
    tensors, meta = {}, []
    for layer in range(2):
        for kind in ("key", "value"):
            made = side(layer)
            tensors |= {f"L{layer}_H0_{kind}_eval": made.variance[0], f"L{layer}_H0_{kind}_evec": made.basis[0].T}
            meta.append({"layer_idx": layer, "head_idx": 0, "head_type": kind, "n_samples": 500, "head_dim": DIM})
    torch.save(tensors, folder / "old.pt")
    (folder / "old_meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder / "old.pt"


def read_original(path: Path) -> Profile:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_original(path.parent / "old.pt")


def use_original(held: Profile) -> None:
    build_codec(held, PRESETS["high"], Dials(), quantizer="uniform")


# Models ---------------------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(folder)
    return folder / "model.safetensors"


def make_shards(folder: Path) -> Path:
    """The same as two files and the index of their tensors."""
    from safetensors.torch import load_file, save_file

    whole = make_model(folder)
    tensors = list(load_file(whole).items())
    parts = {f"model-0000{i}-of-00002.safetensors": dict(tensors[i - 1 :: 2]) for i in (1, 2)}
    for name, part in parts.items():
        save_file(part, folder / name)
    whole.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return folder / "model.safetensors.index.json"


def read_weights(path: Path) -> dict[str, Any]:
    """The configuration is not what is mutated, so the model is made of it once."""
    with patch("spectralquant.model_folder.without_weights", model_without_weights):
        return fingerprint_of_folder(path.parent)


@cache
def model_without_weights(folder: Path) -> Any:
    return without_weights(folder)


def make_config(folder: Path) -> Path:
    return make_model(folder).with_name("config.json")


# Runs -----------------------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> Path:
    """An evaluation of all tasks, and a bench."""
    about: dict[str, Any] = {"command": "spectralquant evaluate", "device": "cpu", "threads": 2, "dtype": "float32", "python": "3.11"}
    about["versions"] = {"torch": "2.13", "hqq": None}
    plan = {"model": "tiny", "methods": ["fp16", "high"], "windows": 2, "scored": 4, "chunk": 2, "seed": 0}
    (folder / "config.json").write_text(json.dumps({"plan": plan, **about, "unavailable": {"hqq-int4": "not installed"}}, indent=1), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for name, kl in (("fp16", 1e-6), ("high", 0.01)):
        for window in (0, 1):
            where = {"task": "language", "unit": f"prose/512/{window}", "text": "prose", "context": 512, "window": window, "method": name}
            rows.append({**where, "kl": [kl, 2 * kl, kl], "agree": [1, 1, 0], "nll": [1.5, 2.0], "nll_plain": [1.4, 2.0], "bits": 2.5, "whole_bits": 3.0})
        where = {"task": "needles", "unit": "sentence/64/0.5/0", "kind": "sentence", "length": 64, "depth": 0.5, "sample": 0, "method": name}
        rows.append({**where, "answer": "7", "output": "7", "correct": 1, "answer_nll": 0.5, "bits": 2.5})
        lists = {"problem": [0, 1], "output": ["#### 1", "2"], "expected": ["1", "1"], "correct": [1, 0], "correct_strict": [1, 0]}
        rows.append({"task": "problems", "unit": "batch/0", "method": name, **lists, "bits": 2.5})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    figures = {"prompt_s": 0.5, "prompt_s_low": 0.4, "prompt_s_high": 0.6, "tokens_per_s": 9.0, "tokens_per_s_low": 8.0, "tokens_per_s_high": 10.0}
    sizes = {"cache_bytes": 1000, "fp16_bytes": 4000, "codec_bytes": 10, "peak_bytes": None, "decode_mode": None}
    benched = [{"cache": name, "context": context, **figures, **sizes} for context in (512, 1024) for name in ("fp16", "high")]
    speed = {"model": "tiny", "presets": ["high"], "contexts": [512, 1024], "new_tokens": 8, "repeats": 3, "text": "stdlib:ast"}
    (folder / "bench.json").write_text(json.dumps({"plan": speed, **about, "rows": benched}, indent=1), encoding="utf-8")
    return folder / "rows.jsonl"


def read_report(path: Path) -> dict[str, Any]:
    report = build_report(path.parent)
    report.as_markdown()
    return report.as_json()


def read_page(path: Path) -> str:
    return render(read_run(path.parent))


def make_problems(folder: Path) -> Path:
    lines = [json.dumps({"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}) for i in range(10)]
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "problems.jsonl"


def same_cache(a: Any, b: Any) -> bool:
    return equal(caches.content(a), caches.content(b))


def use_cache(held: Any) -> None:
    caches.go_on(caches.llama()[0], held)


def use_sliding(held: Any) -> None:
    caches.go_on(caches.gemma()[0], held)


READERS = {
    reader.name: reader
    for reader in (
        Reader("calibration", make_calibration, load_profile, equal, (edit_tensors,), use_profile, sealed=True),
        Reader("calibration, header alone", make_calibration, read_fingerprint, equal, (edit_tensors,)),
        Reader("calibration of an encoder", make_encoder, read_encoder, equal, (edit_tensors,), use_encoder, sealed=True),
        Reader("original package, tensors", make_original, read_original, equal, (edit_archive,), use_original, sealed=True),
        Reader("original package, meta", lambda f: make_original(f).with_name("old_meta.json"), read_original, equal, (edit_json,), use_original),
        Reader("model, weights", make_model, read_weights, equal, (edit_tensors,)),
        Reader("model, index", make_shards, read_weights, equal, (edit_json,)),
        Reader("model, config.json", make_config, lambda p: fingerprint_of_folder(p.parent), equal, (edit_json,)),
        Reader("run, rows", make_run, read_report, equal, (edit_json,)),
        Reader("run, configuration", lambda f: make_run(f).with_name("config.json"), read_report, equal, (edit_json,)),
        Reader("page, rows", make_run, read_page, equal, (edit_json,), slow=True),
        Reader("page, bench", lambda f: make_run(f).with_name("bench.json"), read_page, equal, (edit_json,), slow=True),
        Reader("text, JSON lines", make_problems, lambda p: read_text(str(p)), equal, (edit_json,)),
        Reader("word problems", make_problems, lambda p: read_problems(p, 2), equal, (edit_json,)),
        Reader("cache", caches.make_cache, caches.read_cache, same_cache, (edit_tensors,), use_cache, sealed=True),
        Reader("cache, sliding window", caches.make_sliding, caches.read_sliding, same_cache, (edit_tensors,), use_sliding, sealed=True),
        Reader("store, block", lambda f: caches.make_store(f, "block"), caches.read_block, equal, (edit_tensors,), caches.use_entry, sealed=True),
        Reader("store, block in fewer bytes", caches.make_archived_block, caches.read_block, equal, (edit_tensors,), caches.use_entry, sealed=True),
        Reader("store, tail", lambda f: caches.make_store(f, "tail"), Tail.read, equal, (edit_tensors,), lambda t: caches.use_entry(tail=t), sealed=True),
        Reader("archive model", caches.make_archive_model, caches.read_archive_model, equal, (edit_tensors,), sealed=True),
        Reader("archive", caches.make_archived, caches.read_archived, same_cache, (edit_tensors,), use_cache, sealed=True),
    )
}
