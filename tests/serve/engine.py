"""Run prompts through vLLM in a process of its own: its engines leave a process no second one.

    python -m tests.serve.engine < job.json > /dev/null

The job names a model's folder, options of `vllm.LLM`, a file for the results and passes over
prompts: all at once, or one by one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOGETHER, ONE_BY_ONE = "together", "one by one"


@dataclass
class Pass:
    """What vLLM made of every prompt."""

    tokens: list[list[int]]
    log_probs: list[list[float]]
    """Of those tokens."""
    cached: list[int]
    """Tokens of each prompt that the prefix cache had."""
    seconds: float


def environment(processes: int = 1) -> dict[str, str]:
    """Variables for one engine or server on this CPU, without the network."""
    cores = len(os.sched_getaffinity(0))
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
    }


def run(
    folder: Path, prompts: list[list[int]], passes: tuple[str, ...], home: Path,
    max_tokens: int = 64, **options: object,
) -> list[Pass]:  # fmt: skip
    """Start vLLM on a folder and pass the prompts through it, once for each of `passes`."""
    result = home / "result.json"
    job = {
        "options": {"model": str(folder), "enforce_eager": True, "max_num_seqs": 32, **options},
        "prompts": prompts,
        "passes": passes,
        "max_tokens": max_tokens,
        "result": str(result),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.engine"],
        input=json.dumps(job),
        env=environment(int(options.get("tensor_parallel_size", 1))),  # type: ignore[call-overload]
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [Pass(**kept) for kept in json.loads(result.read_text())]


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(sys.stdin.read())
    model = LLM(**job["options"])
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=0
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    passes = []
    for kind in job["passes"]:
        start = time.perf_counter()
        calls = [prompts] if kind == TOGETHER else [[prompt] for prompt in prompts]
        answers = [a for call in calls for a in model.generate(call, sampling, use_tqdm=False)]
        seconds = time.perf_counter() - start
        outputs = [answer.outputs[0] for answer in answers]
        passes.append({
            "tokens": [list(o.token_ids) for o in outputs],
            "log_probs": [
                [at[t].logprob for at, t in zip(o.logprobs, o.token_ids, strict=True)]
                for o in outputs
            ],
            "cached": [answer.num_cached_tokens or 0 for answer in answers],
            "seconds": seconds,
        })  # fmt: skip
    Path(job["result"]).write_text(json.dumps(passes))


if __name__ == "__main__":
    main()
