"""Loss curves: a picture with the losses in it, or a reason."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from megatron_coe.analysis.curves import describe_end, plot_losses


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


RECORDS = [
    {"step": 1, "train_loss": 5.0, "lr": 0.1},
    {"step": 2, "train_loss": 4.0, "valid_loss": 4.5},
    {"step": 3, "train_loss": 3.0, "valid_loss": 3.5, "unigram_entropy": 5.5},
]


def test_a_png_is_drawn(tmp_path):
    output = tmp_path / "new" / "loss.png"
    plot_losses(write(tmp_path / "metrics.jsonl", RECORDS), output, "title")
    assert output.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert output.stat().st_size > 5000


@pytest.mark.parametrize(
    ("records", "curves"),
    [(RECORDS, 3), (RECORDS[:2], 2), (RECORDS[:1], 1)],
    ids=["with entropy", "two curves", "training only"],
)
def test_each_curve_that_there_is_has_a_label(tmp_path, monkeypatch, records, curves):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    output = tmp_path / "loss.svg"
    plot_losses(write(tmp_path / "metrics.jsonl", records), output)
    texts = [node.text for node in ElementTree.parse(output).iter() if node.tag.endswith("text")]
    names = {"training", "validation", "unigram entropy"} & set(texts)
    assert len(names) == curves
    assert "loss (nats per token)" in texts


def test_the_end_of_a_run_is_told_beside_the_entropy(tmp_path):
    path = tmp_path / "metrics.jsonl"
    level = "2.0000 nats below the text's unigram entropy of 5.5000"
    assert describe_end(write(path, RECORDS)) == f"validation loss 3.5000 at step 3, {level}"
    assert describe_end(write(path, RECORDS[:2])) == "validation loss 4.5000 at step 2"
    assert describe_end(write(path, RECORDS[:1])) == "no validation loss"


def test_a_run_without_losses_is_refused(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [{"step": 1, "lr": 0.1}])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: holds no losses"):
        plot_losses(path, tmp_path / "loss.png")
