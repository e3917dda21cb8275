"""Trained models for vLLM, and what transformers computes with them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.serve.train_models import MODELS

ROOT = Path(__file__).parents[2]
PROMPTS = 32
NEW_TOKENS = 64


@pytest.fixture(scope="session")
def home() -> Path:
    """Models of `train_models.py`, which another environment trains; those there are kept."""
    home = Path(os.environ.get("SERVE_MODELS", ROOT / "runs" / "serve-models"))
    if not all((home / name / "hf" / "config.json").exists() for name in MODELS):
        subprocess.run(
            [os.environ["TRAINING_PYTHON"], ROOT / "tests/serve/train_models.py", home], check=True
        )
    return home


@pytest.fixture(scope="session")
def prompts(home: Path) -> list[list[int]]:
    """Held-out questions, whole and cut off, of 32 different lengths: 3 to 95 tokens."""
    from transformers import AutoTokenizer

    import megatron_coe.hf.auto  # noqa: F401 - no code of the folder is run

    tokenizer = AutoTokenizer.from_pretrained(home / "quickstart" / "hf")
    texts = []
    with open(home / "valid.jsonl", encoding="utf-8") as lines:
        for line, _ in zip(lines, range(PROMPTS), strict=False):
            texts.append(f"query : {json.loads(line)['query']} response :")
    ids = [tokenizer(text).input_ids for text in texts]
    return [i[: 3 + 3 * number] if len(i) > 3 + 3 * number else i for number, i in enumerate(ids)]
