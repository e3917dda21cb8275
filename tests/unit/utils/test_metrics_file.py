"""Reading `metrics.jsonl`, and shortening it for a resumed run."""

from __future__ import annotations

import pytest

from megatron_coe.utils.metrics_file import drop_records_after, read_records


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a record"):
        read_records(path)
    drop_records_after(path, 7)
    assert read_records(path) == [{"step": 1}]


@pytest.mark.parametrize(
    "metric",
    ['"train_loss": [2]', '"load/x": 1', '"load/x": ["1"]', '"load/x": [[1]]', '"lr": null'],
)
def test_metrics_of_the_wrong_kind_are_refused(tmp_path, metric):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "load/x": [1, 0.5]}\n{"step": 2, ' + metric + "}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a record"):
        read_records(path)
