"""`tools/estimate.py` and `tools/plot_curves.py` as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(REPO / "tools" / tool), *map(str, arguments)],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_estimate_prints_the_sizes_of_a_preset():
    result = run("estimate.py", "--config", "examples/paper/coe-2_4-64.yaml", "train.seed=1")
    assert result.returncode == 0, result.stderr
    assert "780,930,048 (571,214,848 without embedding and head)" in result.stdout
    for name in ("active per token", "FLOPs per token", "memory of a rank", "activations"):
        assert name in result.stdout


def test_estimate_names_the_legal_expert_parallel_sizes():
    layout = "parallel.expert_model_parallel_size=4"
    result = run("estimate.py", "--config", "examples/paper/coe-2_4-64.yaml", layout)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "1, 3, 7, 9, 21, 63" in result.stderr


def test_plot_curves_draws_and_tells_the_end(tmp_path):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    records = [{"step": 1, "train_loss": 5.0}, {"step": 2, "train_loss": 4.0, "valid_loss": 4.5}]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = run("plot_curves.py", metrics, "--output", picture)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{picture}: validation loss 4.5000 at step 2\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    missing = run("plot_curves.py", tmp_path / "none.jsonl", "--output", picture)
    assert missing.returncode == 2
    assert "none.jsonl" in missing.stderr
