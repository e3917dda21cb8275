"""How far a run was at each record: as it was recorded, or as its settings say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_coe.analysis.runs import AXES, Run
from tests.builders import TINY

CONFIG = {"model": {**TINY, "seq_length": 20}, "train": {"global_batch_size": 6}}
PER_STEP = 6 * 20


def write(folder: Path, records: list[dict], config: dict | None = CONFIG) -> Run:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    if config:
        (folder / "config.yaml").write_text(json.dumps(config))
    return Run.read(folder)


def test_steps_and_tokens(tmp_path):
    records = [{"step": 2, "train_loss": 3.0}, {"step": 4, "valid_loss": 2.0}]
    run = write(tmp_path, records)
    assert run.values("valid_loss") == [(4, 2.0)]
    assert run.values("train_loss", "tokens") == [(2 * PER_STEP, 3.0)]
    assert run.values("none", "tokens") == []
    recorded = write(tmp_path, [{**each, "tokens": 7.0} for each in records])
    assert recorded.values("train_loss", "tokens") == [(7.0, 3.0)]


def test_flops_are_those_that_the_model_counts(tmp_path):
    from tests.builders import tiny_provider

    run = write(tmp_path, [{"step": 3, "train_loss": 1.0}])
    per_token = tiny_provider(seq_length=20).flops_per_token(seq_length=20)
    assert run.values("train_loss", "flops") == [(3 * PER_STEP * per_token, 1.0)]


def test_time_is_recorded_or_follows_from_the_rates(tmp_path):
    records = [
        {"step": 1, "train_loss": 9.0, "tokens_per_second": PER_STEP},
        {"step": 4, "valid_loss": 8.0},  # of a validation alone: at the next one's rate
        {"step": 5, "train_loss": 7.0, "tokens_per_second": 2 * PER_STEP},
        {"step": 6, "valid_loss": 6.0},  # none follows: at the last one's
    ]
    run = write(tmp_path, records)
    assert run.values("train_loss", "time") == [(1.0, 9.0), (3.0, 7.0)]
    assert run.values("valid_loss", "time") == [(2.5, 8.0), (3.5, 6.0)]
    clock = write(tmp_path, [{**each, "seconds": each["step"] * 10.0} for each in records])
    assert clock.values("valid_loss", "time") == [(40.0, 8.0), (60.0, 6.0)]
    with pytest.raises(ValueError, match="neither seconds nor tokens_per_second"):
        write(tmp_path, records[1:2]).values("valid_loss", "time")


def test_what_is_missing_is_named(tmp_path):
    assert set(AXES) == {"steps", "tokens", "flops", "time"}
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        Run.read(tmp_path)
    run = write(tmp_path, [{"step": 1, "train_loss": 1.0}], config=None)
    with pytest.raises(OSError, match=r"config\.yaml"):
        run.values("train_loss", "tokens")
    assert run.name == tmp_path.name
