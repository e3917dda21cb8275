"""Plots of a run's metrics: which there are, and what each of their lines is."""

from __future__ import annotations

from pathlib import Path

from megatron_coe.analysis.runs import Run
from megatron_coe.analysis.training_curves import training_plots

RECORDS = [
    {"step": 1, "train_loss": 4.0, "lr": 0.1},
    {"step": 2, "valid_loss": 3.0, "valid_loss/code": 2.0, "valid_loss/prose": 3.5},
    {"step": 4, "valid_loss": 2.5, "valid_loss/code": 1.5, "valid_loss/prose": 3.0, "lr": 0.2},
]


def lines(records: list[dict]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{plot: {label of a line: its points}}"""
    return {
        name: {
            line.get_label(): line.get_xydata().tolist()
            for axes in figure.axes
            for line in axes.get_lines()
        }
        for name, figure, _ in training_plots(Run(Path("metrics.jsonl"), records))
    }


def test_held_out_sets_have_a_line_each():
    assert lines(RECORDS) == {
        "speed": {"learning rate": [[1, 0.1], [4, 0.2]]},
        "held_out": {"code": [[2, 2.0], [4, 1.5]], "prose": [[2, 3.5], [4, 3.0]]},
    }
    assert set(lines(RECORDS[:1])) == {"speed"}
