"""Loss curves of runs, side by side; several runs of one name as a mean with a band."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_coe.analysis.plotting import COLORS, new_figure
from megatron_coe.analysis.runs import Run, axis_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = {"validation": "valid_loss", "training": "train_loss"}


@dataclass(frozen=True)
class Group:
    """Runs that differ by chance alone, such as by their seeds."""

    name: str
    runs: tuple[Run, ...]

    def curve(self, metric: str, axis: str) -> list[tuple[float, float, float]]:
        """Return (position, mean, standard deviation) at every step that all runs recorded.

        Positions are means too: runs take different times to the same step. The deviation of one
        run is 0.
        """
        of_runs = []
        for run in self.runs:
            steps = run.values(metric, "steps")
            points = run.values(metric, axis)
            of_runs.append({step: point for (step, _), point in zip(steps, points, strict=True)})
        common = sorted(set.intersection(*(set(points) for points in of_runs)))
        curve = []
        for step in common:
            at, values = zip(*(points[step] for points in of_runs), strict=True)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            curve.append((statistics.mean(at), statistics.mean(values), spread))
        return curve


def describe_end(group: Group) -> str:
    """Describe the last validation loss, beside the unigram entropy where it was recorded."""
    curve = group.curve(LOSSES["validation"], "steps")
    if not curve:
        return "no validation loss"
    step, loss, spread = curve[-1]
    if len(group.runs) > 1:
        return (
            f"validation loss {loss:.4f} ± {spread:.4f} at step {step:g} ({len(group.runs)} runs)"
        )
    text = f"validation loss {loss:.4f} at step {step:g}"
    entropy = group.runs[0].records[-1].get("unigram_entropy")
    if entropy is None:
        return text
    return f"{text}, {entropy - loss:.4f} nats below the text's unigram entropy of {entropy:.4f}"


def plot_losses(
    groups: Sequence[Group], axis: str = "steps", losses: Sequence[str] = (), title: str = ""
) -> Figure:
    """Plot losses (nats per token) of groups of runs over steps, tokens, FLOPs or time.

    A band is the mean of a group's runs ± one standard deviation. With a single group, the unigram
    entropy of the validation text, which a finished run records, is a horizontal line: a model
    below it uses context.

    Args:
        groups: one curve each, or one per loss for a single group.
        axis: one of `runs.AXES`.
        losses: of `LOSSES`; none: both for one group, else validation, or training if there is no
            other.
        title: of the plot.

    Raises:
        ValueError: there are no such losses, the settings lack what the axis needs, or matplotlib
            is missing.
        OSError: there are no settings.
    """
    figure = new_figure(7, 4)
    axes = figure.subplots()
    drawn = 0
    for loss in losses or (LOSSES if len(groups) == 1 else _first_recorded(groups)):
        for number, group in enumerate(groups):
            # One group's losses are told apart by color, several groups' by line.
            color = COLORS[(number if len(groups) > 1 else drawn) % len(COLORS)]
            label = loss if len(groups) == 1 else f"{group.name}, {loss}" if losses else group.name
            drawn += _draw(axes, group.curve(LOSSES[loss], axis), loss, color, label)
    if not drawn:
        named = ", ".join(str(run.metrics) for group in groups for run in group.runs)
        raise ValueError(f"{named}: holds no losses to draw")
    if len(groups) == 1:  # far above what is compared where there are several
        _draw_entropy(axes, groups[0])
    axes.set(xlabel=axis_label(axis), ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _first_recorded(groups: Sequence[Group]) -> list[str]:
    """Return the first of `LOSSES` that a group has recorded, if any."""
    for name, key in LOSSES.items():
        if any(group.curve(key, "steps") for group in groups):
            return [name]
    return []


def _draw(
    axes: Axes, curve: list[tuple[float, float, float]], loss: str, color: str, label: str
) -> bool:
    if not curve:
        return False
    positions, means, spreads = zip(*curve, strict=True)
    style = (
        {"linewidth": 2, "marker": "o", "markersize": 3}
        if loss == "validation"
        else {"linewidth": 1, "alpha": 0.8}
    )
    axes.plot(positions, means, color=color, label=label, **style)
    if any(spreads):
        low, high = zip(*((m - s, m + s) for m, s in zip(means, spreads, strict=True)), strict=True)
        axes.fill_between(positions, low, high, color=color, alpha=0.2, linewidth=0)
    return True


def _draw_entropy(axes: Axes, group: Group) -> None:
    """Draw the unigram entropy, where all runs that recorded it agree."""
    ends = [run.records[-1] for run in group.runs if run.records]
    levels = {record["unigram_entropy"] for record in ends if "unigram_entropy" in record}
    if len(levels) == 1:
        level = levels.pop()
        axes.axhline(level, color="gray", linestyle="--", linewidth=1, label="unigram entropy")
