"""lm_eval through vLLM and through transformers: the same tasks, the same answers and results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

import megatron_coe.hf.auto  # noqa: F401 - no code of the folder is run
from tests.serve import engine

pytestmark = pytest.mark.serve

ROOT = Path(__file__).parents[2]
QUESTIONS = 40


def evaluate(home: Path, model: str, arguments: str) -> tuple[dict[str, float], list[str]]:
    """Return the metrics, and the generated answers in the order of the questions."""
    output = home / f"results-{model}"
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments),
        *("--include_path", ROOT / "examples/evaluate", "--tasks", "qa_exact_match,qa_likelihood"),
        *("--batch_size", "8" if model == "hf" else "auto", "--output_path", output),
        "--log_samples",
        *(("--device", "cpu") if model == "hf" else ()),
    ]
    done = subprocess.run(
        command,
        env=engine.environment() | {"HF_HOME": str(home / "cache")},
        capture_output=True,
        text=True,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    (path,) = output.rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    metrics = {
        metric: results[task][f"{metric},none"]
        for task, metric in (
            ("qa_exact_match", "exact_match"),
            ("qa_likelihood", "acc"),
            ("qa_likelihood", "bits_per_byte"),
        )
    }
    (path,) = output.rglob("samples_qa_exact_match_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    return metrics, [s["resps"][0][0] for s in sorted(samples, key=lambda s: s["doc_id"])]


def questions(home: Path, folder: Path) -> list[dict[str, str]]:
    """Return held-out questions and answers that the model can read whole.

    Of longer ones lm_eval gives vLLM a token less than transformers.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    room = json.loads((folder / "config.json").read_text())["max_position_embeddings"] - 8
    found = []
    for line in (home / "valid.jsonl").read_text(encoding="utf-8").splitlines():
        query, response = (json.loads(line)[key] for key in ("query", "response"))
        if len(tokenizer(f"query : {query} response : {response}").input_ids) < room:
            found.append({"query": query, "response": response})
    return found[:QUESTIONS]


def test_lm_eval_through_vllm_is_lm_eval_through_transformers(home, tmp_path):
    folder = home / "upcycled" / "hf"
    rows = questions(home, folder)
    assert len(rows) == QUESTIONS
    data = tmp_path / "runs/quickstart/data"  # where the task files look
    data.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), data / "valid.parquet")
    model = f"pretrained={folder},dtype=float32"
    expected, answers = evaluate(tmp_path, "hf", f"{model},trust_remote_code=True")
    found, served = evaluate(tmp_path, "vllm", f"{model},enforce_eager=True,max_num_seqs=8")
    print(f"\nlm_eval: {found}, {expected}, {len(set(served))} different answers")
    assert len(set(served)) >= 10
    assert served == answers
    assert found == pytest.approx(expected, abs=1e-5)
