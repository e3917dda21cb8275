"""A run imports Megatron, and of other packages only what it uses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
MADE = REPO / "tests" / "data" / "777423a"
PROGRAM = """
import json, sys
import torch, megatron.core
before = set(sys.modules)
from megatron_coe.cli.main import main
status = main()
packages = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([status, sorted(packages - set(sys.stdlib_module_names))]))
"""
RUN = (
    *("train", "--config", "config.yaml", "train.steps=2", "train.exit_step=null"),
    *("model.attention_dropout=0.0", "parallel.expert_model_parallel_size=1"),
    *("log.dir=new", "log.profile_steps=null"),
)
USED = {
    *("megatron", "megatron_coe", "torch", "numpy", "psutil"),
    *("omegaconf", "attr", "yaml", "tqdm"),  # omegaconf imports attr where it is
    *("sentencepiece", "tokenizers"),  # reads the tokenizer, checks that it can be exported
    *("tensorboard", "google", "absl", "xxhash"),
}


def test_a_run_imports_what_it_uses(tmp_path: Path) -> None:
    """Of a process of its own, which has validated and saved, too."""
    shutil.copytree(MADE, tmp_path, dirs_exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *RUN],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    status, packages = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    assert "valid loss" in done.stdout
    assert list(tmp_path.glob("new/checkpoints/step_*"))
    assert set(packages) <= USED, set(packages) - USED
    assert {"torch", "megatron_coe", "sentencepiece"} <= set(packages)
