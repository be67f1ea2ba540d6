"""A compressed prefix from disk against computing it again: time to the first token, time to save, bytes.

    python benchmarks/prefix.py --model smollm2 --tokens 2048 [--archive FILE] --out FILE

`recompute`: the model reads the prompt into its own uncompressed cache and gives the first token's logits. `file`: `SpectralCache.load`, and the logits of the
last token from a copy of it. `store`: `engine.generate(max_new_tokens=1, store=...)` with all of the prompt stored, everything included. `archive` (--archive
FILE): `engine.archive_prefix` with everything included, `engine.load_archived`, and the logits of the last token from that; FILE is the archive model, which is
fitted and written first where there is none. `pack`: packing an uncompressed cache, which loading an archive includes and `recompute` does not. All but the
saving of archives are medians. "cold": files are taken out of the operating system's cache before. The calibration is loaded and the model is warm in all
cases.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from calibration import command_line
from tqdm.auto import tqdm
from transformers import DynamicCache

from spectralquant import PrefixStore, SpectralCache, SpectralQuantEngine
from spectralquant.archive.predictor import ArchiveModel, load_archive
from spectralquant.cli.output import Output
from spectralquant.cli.session import open_session
from spectralquant.compat import cache_argument, last_logits
from spectralquant.corpus import get_default_calibration_texts
from spectralquant.evaluation.runner import machine
from spectralquant.files import write_json


class Bench:
    """A model with its calibration, and a prompt."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.session = open_session(args.model, args.calibration, False, Output(True), args.dtype)
        self.model = self.session.model
        self.engine = SpectralQuantEngine.of(self.session.profile, compression=args.preset, quantizer=args.quantizer)
        text = args.text.read_text(encoding="utf-8") if args.text else "\n\n".join(get_default_calibration_texts())
        ids = self.session.tokenizer(text, return_tensors="pt").input_ids
        need = max(args.tokens)
        self.ids = ids.repeat(1, -(-need // ids.shape[1]))[:, :need].to(self.model.device)
        self.archive = None if args.archive is None else self.archive_model(args.archive)

    def archive_model(self, path: Path) -> ArchiveModel:
        if not path.is_file():
            self.engine.fit_archive(self.model, self.session.tokenizer).save(path)
        return load_archive(path, self.engine.profile_of(self.model)).to(self.model.device)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=True, **cache_argument(self.model, cache), **last_logits(self.model)).logits

    def seconds(self, run: Callable[[], Any], repeats: int, before: Callable[[], None] = lambda: None) -> float:
        """Median of `repeats` runs, the device waited for."""
        times: list[float] = []
        for _ in range(repeats):
            before()
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, tokens: int, repeats: int, folder: Path) -> dict[str, Any]:
        ids, engine, model = self.ids[:, :tokens], self.engine, self.model
        slow = 1 if tokens > 8192 and model.device.type == "cpu" else repeats
        self.logits(ids[:, :64], DynamicCache(config=model.config))
        row: dict[str, Any] = {"tokens": tokens, "repeats": repeats}
        row["recompute_s"] = self.seconds(lambda: self.logits(ids, DynamicCache(config=model.config)), slow)
        cache = engine.cache(model)
        self.logits(ids, cache)
        path = folder / "prefix.safetensors"
        row["file_save_s"] = self.seconds(lambda: cache.save(path, ids), repeats)
        row["file_bytes"], row["fp16_bytes"], row["cache_bytes"] = path.stat().st_size, cache.dense_bytes, cache.nbytes

        def from_file() -> None:
            loaded = SpectralCache.load(path, model, engine)
            loaded.roll_back(tokens - 1)
            self.logits(ids[:, -1:], loaded)

        row["file_load_s"] = self.seconds(lambda: SpectralCache.load(path, model, engine), repeats)
        row["file_first_token_s"] = self.seconds(from_file, repeats)
        row["file_first_token_cold_s"] = self.seconds(from_file, repeats, lambda: drop(folder))
        path.unlink()
        row |= self.measure_store(ids, repeats, PrefixStore(folder / "store", "100GB"))
        return row if self.archive is None else {**row, **self.measure_archive(ids, repeats, folder / "archive", self.archive)}

    def measure_archive(self, ids: torch.Tensor, repeats: int, path: Path, archive: ArchiveModel) -> dict[str, Any]:
        told = self.engine.archive_prefix(self.model, self.session.tokenizer, ids, path, archive)

        def from_archive() -> None:
            loaded = self.engine.load_archived(path, self.model, archive)
            loaded.roll_back(ids.shape[1] - 1)
            self.logits(ids[:, -1:], loaded)

        row = {"archive_bytes": told["bytes"], "archive_ratio": told["ratio"], "archive_save_s": told["seconds"]}
        dense = self.engine.collect_kv(self.model, self.session.tokenizer, ids)
        row["pack_s"] = self.seconds(lambda: self.engine.compress_kv_cache(dense, self.model), repeats)
        row["archive_load_s"] = self.seconds(lambda: self.engine.load_archived(path, self.model, archive), repeats)
        return {**row, "archive_first_token_s": self.seconds(from_archive, repeats)}

    def measure_store(self, ids: torch.Tensor, repeats: int, store: PrefixStore) -> dict[str, Any]:
        def generate() -> dict[str, Any]:
            return self.engine.generate(self.model, self.session.tokenizer, ids, 1, store=store)["stats"]

        miss = generate()
        row = {"store_miss_s": miss["seconds"], "store_save_s": miss["store"]["save_seconds"], "store_bytes": miss["store"]["written_bytes"]}
        row["store_first_token_s"] = self.seconds(generate, repeats)
        row["store_first_token_cold_s"] = self.seconds(generate, repeats, lambda: drop(store.directory))
        hit = generate()["store"]
        assert hit["hit_tokens"] == ids.shape[1] - 1
        return {**row, "store_load_s": hit["load_seconds"]}


def drop(folder: Path) -> None:
    """Take all files of `folder` out of the operating system's cache, where it can be asked to."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="name on the hub, folder, .gguf file, or smollm2 (default)")
    parser.add_argument("--calibration", type=Path, help="file or folder (default: as every verb finds it)")
    parser.add_argument("--dtype", help="of the model")
    parser.add_argument("--preset", default="high")
    parser.add_argument("--quantizer", default="joint", help="joint (default) or uniform, which packs faster")
    parser.add_argument("--text", type=Path, help="what the prompt is cut from (default: the bundled corpus)")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="archive model of the same model (.safetensors); adds the columns of archives")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    bench = Bench(args)
    document: dict[str, Any] = {
        "command": command_line("prefix", sys.argv[1:]),
        "model": bench.session.label,
        "preset": args.preset,
        "quantizer": args.quantizer,
        **machine(bench.model),
    }
    document["rows"] = []
    for tokens in tqdm(args.tokens, desc="prompts", disable=len(args.tokens) == 1):
        with tempfile.TemporaryDirectory() as folder:
            row = bench.measure(tokens, args.repeats, Path(folder))
        document["rows"].append(row)
        print(" ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        write_json(args.out, document)


if __name__ == "__main__":
    main()
