"""lm_eval through vLLM and through transformers: the same tasks, the same answers and results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_lm_eval_through_vllm_is_lm_eval_through_transformers(home, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open(home / "valid.jsonl", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines][:QUESTIONS]
    data = tmp_path / "runs/quickstart/data"  # where the task files look
    data.mkdir(parents=True)
    rows = [{key: record[key] for key in ("query", "response")} for record in records]
    pq.write_table(pa.Table.from_pylist(rows), data / "valid.parquet")
    folder = f"pretrained={home / 'quickstart' / 'hf'},dtype=float32"
    expected, answers = evaluate(tmp_path, "hf", f"{folder},trust_remote_code=True")
    found, served = evaluate(tmp_path, "vllm", f"{folder},enforce_eager=True,max_num_seqs=8")
    print(f"\nlm_eval: {found}, {len(set(served))} different answers")
    assert len(set(served)) > QUESTIONS // 2
    assert served == answers
    assert found == pytest.approx(expected, abs=1e-4)
