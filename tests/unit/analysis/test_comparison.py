"""Comparisons: real runs are made in tests/functional, here is what is said of their losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_coe.analysis.comparison import as_table, compare
from megatron_coe.analysis.run_jobs import last_validation_loss


def test_table_pairs_differences_by_seed() -> None:
    table = as_table({"base": [1.0, 2.0], "other": [0.9, 1.7]}, seeds=[7, 8])
    assert table.splitlines() == [
        "| model | seed 7 | seed 8 | mean ± std | difference ± std |",
        "| --- | --- | --- | --- | --- |",
        "| base | 1.0000 | 2.0000 | 1.5000 ± 0.7071 |  |",
        "| other | 0.9000 | 1.7000 | 1.3000 ± 0.5657 | -0.2000 ± 0.1414 |",
    ]


def test_the_newest_validation_loss_counts(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    records = [
        {"step": 1, "valid_loss": 3.0},
        {"step": 2, "valid_loss": 2.0},
        {"step": 3, "train_loss": 9.0},
    ]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert last_validation_loss(tmp_path) == 2.0
    metrics.write_text(json.dumps(records[2]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl.*data\.valid"):
        last_validation_loss(tmp_path)


def test_models_need_names_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same name"):
        compare([tmp_path / "a" / "m.yaml", tmp_path / "b" / "m.yaml"], [1], tmp_path, [])


def test_a_failed_run_is_named(tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("data: {tokenizer: none.model, train: [none], valid: [none]}\n")
    with pytest.raises(ValueError, match=r"wrong_seed-1.*status 2: .*tokenizer none.model"):
        compare([config], [1], tmp_path, [])
    with pytest.raises(OSError, match=r"missing\.yaml"):
        compare([config, tmp_path / "missing.yaml"], [1], tmp_path, [])
    with pytest.raises(ValueError, match=r"seeds=\[1, 1\]"):
        compare([config], [1, 1], tmp_path, [])
