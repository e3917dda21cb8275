"""`make quickstart`, with little data and few steps, in a copy of the product."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = (
    "megatron_coe",
    "tools",
    "examples",
    "pretrain_coe.py",
    "Makefile",
    "pyproject.toml",
    "setup.py",
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy whose environment is the one of this test, and counts as installed."""
    for name in (*COPIED, "constraints-0.16.txt", "constraints-0.19.txt"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".installed-quickstart").touch()
    return tmp_path


def run(copy: Path, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_it_exports_the_model_and_prints_answers_beside_the_true_ones(copy: Path) -> None:
    pytest.importorskip("reasoning_gym", reason="the corpus needs the extra `data`")
    folder = copy / "runs" / "quickstart"
    sizes = ("--train-size", "2000", "--valid-size", "200")
    run(
        copy, sys.executable, "tools/make_corpus.py", *("--output", str(folder / "data")),
        *sizes,
    )  # fmt: skip
    quickstart = ("make", "quickstart", "OVERRIDES=train.steps=2 train.eval_interval=2")
    first = run(copy, *quickstart)

    lines = (folder / "data" / "valid.jsonl").read_text().splitlines()
    answers = (folder / "answers.txt").read_text()
    assert answers in first
    for record in map(json.loads, lines[:4]):
        assert f"question:  {record['query']}\ngenerated:" in answers
        assert f"\ntrue:      {record['response']}\n" in answers
    assert answers.count("question:  ") == 4
    assert {path.name for path in (folder / "hf").iterdir()} >= {
        *("config.json", "model.safetensors", "modeling_coe.py", "tokenizer.json"),
    }

    written = (folder / "hf" / "config.json").stat().st_mtime_ns
    again = run(copy, *quickstart)
    assert "pretrain_coe.py" not in again
    assert answers in again
    assert (folder / "hf" / "config.json").stat().st_mtime_ns == written
