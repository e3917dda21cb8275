"""Loss curves: a plot with the losses in it, means with their spread, or a reason."""

from __future__ import annotations

import json
import statistics

import pytest

from megatron_coe.analysis.loss_curves import Group, describe_end, plot_losses
from megatron_coe.analysis.plotting import save
from megatron_coe.analysis.runs import Run

RECORDS = [
    {"step": 1, "train_loss": 5.0, "lr": 0.1},
    {"step": 2, "train_loss": 4.0, "valid_loss": 4.5},
    {"step": 3, "train_loss": 3.0, "valid_loss": 3.5, "unigram_entropy": 5.5},
]


def group(folder, *of_runs, name="it") -> Group:
    runs = []
    for number, records in enumerate(of_runs):
        path = folder / f"{name}-{number}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        runs.append(Run.read(path))
    return Group(name, tuple(runs))


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def lines(figure) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): list(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines
    }


def test_a_png_is_drawn(tmp_path):
    output = tmp_path / "new" / "loss.png"
    save(plot_losses([group(tmp_path, RECORDS)], title="title"), output)
    assert output.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert output.stat().st_size > 5000
    with pytest.raises(ValueError, match=r"loss\.docx: unknown image format; use one of"):
        save(plot_losses([group(tmp_path, RECORDS)]), tmp_path / "loss.docx")


@pytest.mark.parametrize(
    ("records", "curves"),
    [
        (RECORDS, ["validation", "training", "unigram entropy"]),
        (RECORDS[:2], ["validation", "training"]),
        (RECORDS[:1], ["training"]),
    ],
    ids=["with entropy", "two curves", "training only"],
)
def test_each_loss_of_one_run_is_a_curve(tmp_path, records, curves):
    figure = plot_losses([group(tmp_path, records)])
    assert labels(figure) == curves
    assert figure.axes[0].get_ylabel() == "loss (nats per token)"
    drawn = lines(figure)["training"]
    assert drawn == [(record["step"], record["train_loss"]) for record in records]


def test_several_runs_are_compared_by_validation(tmp_path):
    ours, others = (
        group(tmp_path, RECORDS, name="ours"),
        group(tmp_path, RECORDS[:2], name="others"),
    )
    figure = plot_losses([ours, others])
    assert labels(figure) == ["ours", "others"]
    assert lines(figure)["ours"] == [(2, 4.5), (3, 3.5)]
    both = plot_losses([ours, others], losses=["training", "validation"])
    assert labels(both)[:2] == ["ours, training", "others, training"]
    only = plot_losses([group(tmp_path, RECORDS[:1], name=name) for name in "ab"])
    assert lines(only)["b"] == [(1, 5.0)]


def test_seeds_are_a_mean_in_a_band_over_the_steps_of_all(tmp_path):
    values = {2: (4.5, 4.0, 5.0), 3: (3.5, 3.25, 2.5)}
    of_runs = [
        [{"step": step, "valid_loss": losses[run]} for step, losses in values.items()]
        for run in range(3)
    ]
    of_runs[0].append({"step": 4, "valid_loss": 1.0})  # the others have not come so far
    seeds = group(tmp_path, *of_runs)
    expected = [
        (step, pytest.approx(statistics.mean(losses)), pytest.approx(statistics.stdev(losses)))
        for step, losses in values.items()
    ]
    assert seeds.curve("valid_loss", "steps") == expected
    figure = plot_losses([seeds])
    (band,) = figure.axes[0].collections
    heights = {tuple(point) for point in band.get_paths()[0].vertices}
    for step, mean, spread in expected:
        for edge in (mean.expected - spread.expected, mean.expected + spread.expected):
            assert any(x == step and y == pytest.approx(edge) for x, y in heights)
    assert describe_end(seeds) == "validation loss 3.0833 ± 0.5204 at step 3 (3 runs)"


def test_the_end_of_a_run_is_told_beside_the_entropy(tmp_path):
    level = "2.0000 nats below the text's unigram entropy of 5.5000"
    told = [describe_end(group(tmp_path, RECORDS[:count])) for count in (3, 2, 1)]
    assert told[0] == f"validation loss 3.5000 at step 3, {level}"
    assert told[1:] == ["validation loss 4.5000 at step 2", "no validation loss"]


@pytest.mark.parametrize("records", [[], [{"step": 1, "lr": 0.1}]], ids=["empty", "no loss"])
def test_a_run_without_losses_is_refused(tmp_path, records):
    with pytest.raises(ValueError, match=r"it-0\.jsonl: holds no losses"):
        plot_losses([group(tmp_path, records)])
