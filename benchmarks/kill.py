"""kill -9 while caches are saved: what is left must be whole.

    python benchmarks/kill.py --kills 200 --out FILE

A process saves a cache to one file and texts to a small store that evicts all the time, over and over, and is killed after a random time. Then the file
must load (it is the one of before or the new one), every entry of the store must be whole, and every text must give the logits that it gave when it was saved,
as far as it is there. The model is tiny and random: what is tried are files.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from calibration import command_line
from decoding import made_up_profile
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from spectralquant import PrefixStore, SpectralCache, SpectralQuantEngine
from spectralquant.compat import cache_argument
from spectralquant.files import write_json
from spectralquant.prefix_store.folder import files, kind_of

LENGTHS = (300, 450, 700, 900)
STORE_BYTES = 400_000
SLOWEST = 0.25
"""Seconds after which a process is killed at the latest."""


class Work:
    """A model, texts, and their caches."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
        self.model = LlamaForCausalLM(config).eval()
        self.engine = SpectralQuantEngine.of(made_up_profile(2, 2, 32), quantizer="uniform")
        self.file, self.store = folder / "cache", PrefixStore(folder / "store", STORE_BYTES)
        self.texts = [torch.randint(0, 99, (1, length)) for length in LENGTHS]
        self.texts.append(torch.cat([self.texts[0][:, :257], self.texts[1]], 1))
        self.caches = [self.read(ids) for ids in self.texts]
        self.logits = [self.next(cache) for cache in self.caches]

    @torch.no_grad()
    def read(self, ids: Tensor) -> SpectralCache:
        cache = self.engine.cache(self.model)
        self.model(ids, **cache_argument(self.model, cache))
        return cache

    @torch.no_grad()
    def next(self, cache: SpectralCache) -> Tensor:
        return self.model(torch.ones(1, 1, dtype=torch.long), **cache_argument(self.model, cache.copy())).logits

    def go_on(self, seed: int) -> None:
        """Save without end."""
        choose = random.Random(seed)
        while True:
            i = choose.randrange(len(self.texts))
            self.caches[i].save(self.file, self.texts[i])
            self.store.save(self.caches[i], self.texts[i])

    def check(self) -> dict[str, int]:
        """What was found whole, and how many files were begun and not finished; raises if anything is not whole."""
        broken = [problem for problem in self.store.verify() if problem.broken]
        if broken:
            raise RuntimeError(f"{broken[0].path}: {broken[0].text}")
        found = {"entries": len(self.store.entries()), "hits": 0, "files": 0}
        path = self.file.with_suffix(".safetensors")
        if path.exists():
            loaded = SpectralCache.load(path, self.model, self.engine)
            match = next(i for i, ids in enumerate(self.texts) if torch.equal(loaded.prefix_ids, ids))
            self.require_same(loaded, match)
            found["files"] = 1
        unfinished = [*(other for other, _ in files(self.store.directory) if kind_of(other) is None), *path.parent.glob(f".{path.name}.*")]
        found["unfinished"] = len(unfinished)
        for other in unfinished:  # so that each is counted once
            other.unlink()
        for i, ids in enumerate(self.texts):
            cache = self.engine.cache(self.model)
            if self.store.load(cache, ids).exact:
                self.require_same(cache, i)
                found["hits"] += 1
        return found

    def require_same(self, cache: SpectralCache, text: int) -> None:
        if not torch.equal(self.next(cache), self.logits[text]):
            raise RuntimeError(f"text {text} came back with other logits")


def kill_one(work: Work, seed: int) -> dict[str, int]:
    """A process that saves, killed; what it has left."""
    child = os.fork()
    if child == 0:
        try:
            work.go_on(seed)
        finally:
            os._exit(1)
    time.sleep(random.Random(seed).uniform(0, SLOWEST))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise RuntimeError(f"the process ended by itself with status {os.waitstatus_to_exitcode(status)}")
    return work.check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a child has no threads but its own
    totals: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder))
        for seed in tqdm(range(args.kills), desc="kills"):
            for name, count in kill_one(work, seed).items():
                totals[name] = totals.get(name, 0) + count
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "safetensors")}}
    document: dict[str, Any] = {"command": command_line("kill", sys.argv[1:]), "versions": versions, "kills": args.kills, "broken": 0, "found": totals}
    print(json.dumps(document))
    write_json(args.out, document)


if __name__ == "__main__":
    main()
