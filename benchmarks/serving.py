"""vLLM with packed pages and without, on the CPU: capacity, speed, and what is said (an environment of tests/serving/install.sh).

    python benchmarks/serving.py --model FOLDER --out FILE

FOLDER: a model with its calibration beside it (`spectralquant calibrate FOLDER --out FOLDER/spectralquant`). Every case is an engine in a process of its own
that answers the same 32 prompts of mixed lengths at once, greedily, in float32; answers are compared token by token up to the first that differs, and their log
probabilities as far as both have the same tokens. `capacity` is what vLLM reports for the same memory in bfloat16, for which an engine is only started.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from calibration import command_line

from spectralquant.corpus import get_default_calibration_texts
from spectralquant.files import write_json

LENGTHS = (20, 60, 127, 129, 200, 257, 300, 400, 513, 640, 900, 1100)
REQUESTS, NEW_TOKENS = 32, 32
ENGINE = {"max_model_len": 2048, "max_num_seqs": REQUESTS, "enforce_eager": True, "disable_log_stats": False}
SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
PACKED = {"additional_config": {"spectralquant": {"preset": "high"}}}
IN_PARTS = {"max_num_batched_tokens": 256}
CASES: dict[str, dict[str, Any]] = {
    "stock": {},
    "packed": PACKED,
    "packed, in parts of 256": PACKED | IN_PARTS,
    "stock, in parts of 256": IN_PARTS,
    "packed, asked twice": PACKED | {"rounds": 2},
}


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An engine's answers, from a process of its own."""
    job, answers = folder / "job.json", folder / "answers.json"
    job.write_text(json.dumps(case))
    subprocess.run([sys.executable, __file__, "--case", str(job), str(answers)], env={**os.environ, **SETTINGS}, check=True, stdout=subprocess.DEVNULL)
    return json.loads(answers.read_text())


def answer_case(job: Path, answers: Path) -> None:
    from vllm import LLM, SamplingParams

    case = json.loads(job.read_text())
    rounds, prompts = case.pop("rounds", 1), case.pop("prompts")
    engine = LLM(**ENGINE, **case)
    config = engine.llm_engine.vllm_config
    said: dict[str, Any] = {"capacity": config.cache_config.kv_cache_size_tokens, "rounds": []}
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=5, ignore_eos=True)
    for _ in range(rounds if prompts else 0):
        began = time.perf_counter()
        outs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        texts = [
            [[token, {str(t): p.logprob for t, p in top.items()}] for token, top in zip(o.token_ids, o.logprobs, strict=True)]
            for o in (x.outputs[0] for x in outs)
        ]
        said["rounds"].append({"seconds": seconds, "answers": texts})
    said["hits"] = sum(m.value for m in engine.get_metrics() if m.name == "vllm:prefix_cache_hits")
    answers.write_text(json.dumps(said))


def compare(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """Of answers to the same prompts."""
    same, off, likely = [], 0.0, 0
    for a, b in zip(ours, theirs, strict=True):
        pairs = list(zip(a, b, strict=True))
        equal = len(list(takewhile(lambda pair: pair[0][0] == pair[1][0], pairs)))
        same.append(equal)
        for (_, x), (_, y) in pairs[: equal + 1]:
            shared = x.keys() & y.keys()
            off, likely = off + sum(abs(x[t] - y[t]) for t in shared), likely + len(shared)
    return {
        "answers": len(same),
        "equal": sum(n == NEW_TOKENS for n in same),
        "tokens_before_the_first_difference": sum(same),
        "log_probability_off": off / likely,
    }


def make_prompts(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)("\n".join(get_default_calibration_texts()[40:]))["input_ids"]
    step = (len(ids) - max(LENGTHS)) // REQUESTS
    return [ids[i * step : i * step + LENGTHS[i % len(LENGTHS)]] for i in range(REQUESTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        answer_case(*args.case)
        return
    prompts, said = make_prompts(args.model), {}
    document: dict[str, Any] = {
        "command": command_line("serving", sys.argv[1:]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("vllm-cpu", "torch", "transformers")}},
        "new_tokens": NEW_TOKENS,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as work:
        for name, case in {"stock": {}, "packed": PACKED}.items():
            capacity = run_case({"model": str(args.model), "dtype": "bfloat16", "prompts": [], **case}, Path(work))["capacity"]
            document.setdefault("capacity", {})[name] = capacity
            print(f"{name}: {capacity:,} tokens in bfloat16", flush=True)
        for name, case in CASES.items():
            said[name] = run_case({"model": str(args.model), "dtype": "float32", "prompts": prompts, **case}, Path(work))
            row = {"seconds": [round["seconds"] for round in said[name]["rounds"]], "prefix_hits": said[name]["hits"]}
            document["cases"][name] = row
            print(name, row, flush=True)
            write_json(args.out, document)
    answers = {name: [r["answers"] for r in result["rounds"]] for name, result in said.items()}
    document["compared"] = {
        "packed with stock": compare(answers["packed"][0], answers["stock"][0]),
        "packed in parts with packed": compare(answers["packed, in parts of 256"][0], answers["packed"][0]),
        "stock in parts with stock": compare(answers["stock, in parts of 256"][0], answers["stock"][0]),
        "asked again with asked first": compare(answers["packed, asked twice"][1], answers["packed, asked twice"][0]),
    }
    document["capacity"]["ratio"] = document["capacity"]["packed"] / document["capacity"]["stock"]
    for name, row in document["compared"].items():
        print(name, row, flush=True)
    write_json(args.out, document)


if __name__ == "__main__":
    main()
