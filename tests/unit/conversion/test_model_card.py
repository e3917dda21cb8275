"""What an exported folder says of the training it comes from, and who may read it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_coe.conversion.export_hf import to_hf

MADE = Path(__file__).parents[2] / "data" / "777423a"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The export of a run that stopped after step 56 of 60, made under a umask of its own."""
    home = tmp_path_factory.mktemp("home") / "777423a"
    shutil.copytree(MADE, home)
    before = os.getcwd(), os.umask(0o027)
    os.chdir(home)
    try:
        to_hf(home / "run" / "checkpoints", home / "my-model")
    finally:
        os.chdir(before[0])
        os.umask(before[1])
    return home / "my-model"


def test_the_card_says_what_was_trained(exported):
    card = (exported / "README.md").read_text()
    table = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    rows = dict(row for row in table if len(row) == 2)
    assert rows["run"] == "run"
    assert rows["training data"].startswith("`train` (mode")
    assert rows["steps, sequences"].startswith("56 of 60, ")
    assert rows["context length"] == "24 tokens"
    assert rows["tokenizer"] == "SentencePiece, bpe, 290 ids"
    records = [json.loads(line) for line in (MADE / "run" / "metrics.jsonl").open()]
    loss = [record["train_loss"] for record in records if "train_loss" in record][-1]
    assert f"{loss:.4f}" in rows["training loss, nats per token"]
    assert rows["software"].startswith("exported with transformers "), "777423a named no versions"
    assert "\nlicense: " in card
    assert 'AutoTokenizer.from_pretrained("my-model"' in card
    assert str(MADE) not in card


def test_every_file_has_the_mode_that_the_umask_gives(exported):
    modes = {path.name: path.stat().st_mode & 0o777 for path in exported.iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_lengths_are_those_of_training(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["max_position_embeddings"] == 24
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (24, "left")
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
