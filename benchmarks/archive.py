"""Archives of cold prefixes: bytes, KL and seconds of what is stored without loss and at low rate, beside the packed cache itself.

    python benchmarks/archive.py [--model M] [--calibration FILE] --text prose=FILE [--context 1024] [--windows 6] --out FILE

An archive model is fitted on the bundled corpus first: moments of --tokens tokens, and the KL that noise in K or V of one layer alone makes on
--sensitivity windows held out of them. Then every window of every text is scored with
  high              the packed cache at preset "high": its exact window included in the bytes, and in what is scored
  lossless          its records coded without loss: the same cache, other bytes
  archive R         all keys and values of the context coded at rate R, decoded, and read uncompressed
  archive R, high   the same packed at preset "high" after decoding, which is what a loaded prefix is
--rate may be repeated. Ratios are to 16-bit keys and values of the coded layers; constants of the archive model are told apart. Scored tokens are fed in
pieces of 16. Seconds are of one thread on a CPU, and of the GPU with the host's share of the work.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from calibration import CHUNK, PRESET, Reference, command_line, describe, named_text, read_references
from tqdm.auto import tqdm
from transformers import DynamicCache

from spectralquant import SpectralQuantEngine
from spectralquant.archive.codec import decode_dense, encode_dense
from spectralquant.archive.lossless import pack_records, unpack_records
from spectralquant.archive.predictor import ArchiveModel
from spectralquant.cli.models import load_model
from spectralquant.cold.fit import FIT_TOKENS, WINDOWS, fit
from spectralquant.corpus import make_samples
from spectralquant.evaluation.metrics import standard_error, token_divergence
from spectralquant.evaluation.plan import DEFAULT_TEXTS
from spectralquant.evaluation.tasks.base import continue_with, hand_over
from spectralquant.evaluation.texts import read_text
from spectralquant.files import write_json
from spectralquant.profile import Profile

RATES = (-4, 0, 2, 4, 8)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    sources = dict(args.text or DEFAULT_TEXTS.items())
    model, tokenizer, label = load_model(args.model, args.dtype)
    document = describe(args, label, sources, command_line("archive", argv))
    document["settings"] |= {"dtype": args.dtype, "tokens": args.tokens, "depth": args.depth}
    document["threads"] = torch.get_num_threads()
    engine = SpectralQuantEngine(compression=PRESET)
    profile = engine.load_calibration(args.calibration) if args.calibration else None
    if profile is None:
        engine.calibrate(model, tokenizer)
        profile = engine.profile_of(model)
    fitted, document["fit"] = fitted_for(model, tokenizer, profile, args)
    references = read_references(model, tokenizer, {name: read_text(source) for name, source in sources.items()}, args)
    lines: list[dict[str, Any]] = []
    with engine.applied_to(model):
        for name, windows in references.items():
            for index, reference in enumerate(tqdm(windows, desc=f"scoring {name}", unit="window")):
                lines += [{"text": name, "window": index, **line} for line in measure(model, engine, fitted, reference, args.rate or RATES)]
                write_json(args.out, {**document, "summary": summarise(lines), "lines": lines})
    for line in summarise(lines):
        print(
            f"{line['text']:12} {line['method']:18} ratio {line['ratio']:6.2f}  KL {line['kl']:.5f} +- {line['kl_se']:.5f}  agreement {line['agreement']:.3f}"
        )


def fitted_for(model: Any, tokenizer: Any, profile: Profile, args: argparse.Namespace) -> tuple[ArchiveModel, dict[str, Any]]:
    """The archive model, and how it was made."""
    began, samples = time.perf_counter(), make_samples(tokenizer, None, max_tokens=args.tokens)
    made = fit(model, profile, samples, args.depth, args.sensitivity)
    seconds = round(time.perf_counter() - began, 1)
    return made.archive, {"tokens": samples.tokens, "seconds": seconds, "constant_bytes": made.archive.nbytes, "sensitivity": made.sensitivity}


def measure(model: Any, engine: SpectralQuantEngine, fitted: ArchiveModel, reference: Reference, rates: Any) -> list[dict[str, Any]]:
    """Lines of one window."""
    device = model.device
    context = [(k.to(device), v.to(device)) for k, v in reference.context]
    whole = sum(2 * 2 * context[i][0].numel() for i in fitted.layers)
    tokens = context[0][0].shape[2]

    def scored(method: str, size: int, cache: Any, **columns: Any) -> dict[str, Any]:
        ids = reference.ids.to(device)
        found = token_divergence(reference.want.to(device), continue_with(model, cache, ids, CHUNK).log_softmax(-1), ids[0, 1:])
        return {
            "method": method,
            "bytes": size,
            "ratio": whole / size,
            "kl": float(found["kl"].mean()),
            "agreement": float(found["agree"].float().mean()),
            **columns,
        }

    packed = hand_over(context, engine.cache(model))
    segments = [packed.layers[i].segment for i in fitted.layers]
    for segment in segments:
        segment.finish()
    records = [s.records[:, :, : s.packed // 128].contiguous() for s in segments]
    exact = sum(4 * s.recent_keys[:, :, : s.recent].numel() + 4 * s.exact_keys[:, :, : int((s.exact_slots >= 0).sum())].numel() for s in segments)
    plain = exact + sum(r.numel() for r in records)
    began = time.perf_counter()
    payloads = [pack_records(s.codec.layout, r) for s, r in zip(segments, records, strict=True)]
    packing = time.perf_counter() - began
    began = time.perf_counter()
    back = [unpack_records(s.codec.layout, p, r.shape[:3]) for s, p, r in zip(segments, payloads, records, strict=True)]
    unpacking = time.perf_counter() - began
    same = all(torch.equal(a, b.cpu()) for a, b in zip(back, records, strict=True))
    lines = [scored("high", plain, packed)]
    size, coded = sum(p.numel() for p in payloads), sum(r.numel() for r in records)
    lossless = {"bytes": exact + size, "ratio": whole / (exact + size), "records": size / coded, "same": same}
    lines.append({**lines[0], "method": "lossless", **lossless, "encode_seconds": packing, "decode_seconds": unpacking})
    for rate in rates:
        began = time.perf_counter()
        payload = encode_dense(fitted, {i: (context[i][0][0], context[i][1][0]) for i in fitted.layers}, rate)
        encoding = time.perf_counter() - began
        began = time.perf_counter()
        decoded = [*context]
        for i, keys, values in decode_dense(fitted, payload, tokens):
            decoded[i] = (keys[None].to(context[i][0].dtype), values[None].to(context[i][1].dtype))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = {"encode_seconds": encoding, "decode_seconds": time.perf_counter() - began}
        lines.append(scored(f"archive {rate}", payload.numel(), hand_over(decoded, DynamicCache()), **seconds))
        lines.append(scored(f"archive {rate}, high", payload.numel(), hand_over(decoded, engine.cache(model))))
    return lines


def summarise(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the windows of each text and method."""
    found: list[dict[str, Any]] = []
    for text, method in dict.fromkeys((line["text"], line["method"]) for line in lines):
        group = [line for line in lines if (line["text"], line["method"]) == (text, method)]
        numbers = [k for k in group[0] if isinstance(group[0][k], float)]
        row = {"text": text, "method": method, "windows": len(group), **{k: mean(line[k] for line in group) for k in numbers}}
        found.append({**row, "kl_se": standard_error([line["kl"] for line in group])})
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, GGUF file or hub name; default: SmolLM2-135M-Instruct from the demo extra")
    parser.add_argument("--dtype", default="float32", help="of the model (default float32)")
    parser.add_argument("--calibration", metavar="FILE", help="calibration of the model; default: measured, or found on this machine")
    parser.add_argument("--text", action="append", type=named_text, metavar="NAME=SOURCE", help="a file, a .jsonl file, or stdlib:module,module")
    parser.add_argument("--tokens", type=int, default=FIT_TOKENS, help=f"tokens of the bundled corpus to fit the archive model on (default {FIT_TOKENS:,})")
    parser.add_argument("--depth", type=int, default=2, help="layers that a layer is predicted from (default 2)")
    parser.add_argument("--sensitivity", type=int, default=WINDOWS, help=f"windows to measure sensitivities on (default {WINDOWS}; 0: none)")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache before the first scored one (default 1024)")
    parser.add_argument("--windows", type=int, default=6, help="windows per text, spread evenly over it (default 6)")
    parser.add_argument("--scored", type=int, default=256, help="scored tokens per window (default 256)")
    parser.add_argument("--rate", type=int, action="append", help=f"may be repeated; default {', '.join(map(str, RATES))}")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON, written after every window")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
