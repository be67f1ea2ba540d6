"""vLLM's engine without a server, in a process of its own: `python offline.py JOB ANSWERS`.

JOB is JSON: {"engine": arguments of `vllm.LLM`, "rounds": [[prompt, ...], ...], "max_tokens": n}. Every round is one call of `generate` with prompts of token
ids. ANSWERS: {"rounds": [[{"tokens", "likely"}, ...], ...], "capacity": tokens, "preemptions": n, "hits": tokens}.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(job: Path, answers: Path) -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(job.read_text())
    engine = LLM(enforce_eager=True, disable_log_stats=False, **asked["engine"])
    sampling = SamplingParams(temperature=0.0, max_tokens=asked["max_tokens"], logprobs=5, ignore_eos=True)
    rounds = [[answer(out.outputs[0]) for out in engine.generate([{"prompt_token_ids": p} for p in prompts], sampling)] for prompts in asked["rounds"]]
    counts = {metric.name: sum(m.value for m in engine.get_metrics() if m.name == metric.name) for metric in engine.get_metrics() if hasattr(metric, "value")}
    said = {
        "rounds": rounds,
        "capacity": engine.llm_engine.vllm_config.cache_config.kv_cache_size_tokens,
        "preemptions": counts.get("vllm:num_preemptions", 0),
        "hits": counts.get("vllm:prefix_cache_hits", 0),
    }
    answers.write_text(json.dumps(said))


def answer(out: Any) -> dict[str, Any]:
    return {"tokens": list(out.token_ids), "likely": [{str(token): value.logprob for token, value in top.items()} for top in out.logprobs]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
