"""Plots of a run's metrics other than its losses (docs/metrics.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_coe.analysis.plotting import colors, new_figure
from megatron_coe.analysis.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS_PER_ROW = 3
LAYERS_SHOWN = 6
"""The most layers, evenly spaced, whose loads are drawn."""

_SPEED = (
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens per second"),
    ("mfu", "model FLOP utilization"),
)
_ROUTING = (
    ("load_entropy", "load entropy / log N"),
    ("load_max_over_mean", "largest load / mean"),
    ("dead_experts", "dead experts"),
    ("router_confidence", "top-k probability mass"),
)


@dataclass(frozen=True)
class Panel:
    """Metrics of a run to draw over its steps in one panel, by label."""

    title: str
    names: dict[str, str]
    is_logarithmic: bool = False


def training_plots(run: Run) -> Iterator[tuple[str, Figure, str]]:
    """Yield name, figure and caption of every plot that the run has metrics for.

    Raises:
        ValueError: matplotlib is missing.
    """
    recorded = list(dict.fromkeys(name for record in run.records for name in record))
    speed = [Panel(title, {title: name}) for name, title in _SPEED if name in recorded]
    if speed:
        titles = ", ".join(panel.title for panel in speed)
        yield "speed", draw(run, speed), f"Over steps: {titles}."
    sets = {name.split("/")[1]: name for name in recorded if name.startswith("valid_loss/")}
    if sets:
        title = "validation loss by set"
        yield "held_out", draw(run, [Panel(title, sets)]), "Validation loss of each held-out set."
    groups = {name.split("/")[1]: name for name in recorded if name.startswith("grad_norm/")}
    if groups:
        title = "gradient norm by group"
        yield "gradients", draw(run, [Panel(title, groups, True)]), "Gradient norm of each group."
    if routing := list(_routing_panels(recorded)):
        caption = "Routing of the training data by iteration, mean over layers."
        yield "routing", draw(run, routing), caption
    if loads := [name for name in recorded if name.startswith("load/")]:
        caption = "Load of each expert over the mean, during training."
        yield "loads", load_heatmaps(run, loads), caption


def draw(run: Run, panels: Sequence[Panel]) -> Figure:
    """Draw panels of curves over steps."""
    columns = min(len(panels), PANELS_PER_ROW)
    rows = -(-len(panels) // PANELS_PER_ROW)
    figure = new_figure(max(3.4 * columns, 6.0), 2.8 * rows)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        shades = colors(len(panel.names))
        for (label, name), color in zip(panel.names.items(), shades, strict=True):
            steps, values = zip(*run.values(name), strict=True)
            axes.plot(steps, values, color=color, label=label, linewidth=1)
        if panel.is_logarithmic:
            axes.set_yscale("log")
        axes.set(xlabel="step")
        axes.set_title(panel.title, fontsize="medium")
        axes.grid(alpha=0.3)
        if len(panel.names) > 1:
            axes.legend(fontsize="x-small")
    return figure


def load_heatmaps(run: Run, names: Sequence[str]) -> Figure:
    """Draw N times the load of every expert (rows) at every logged step (columns).

    There is a panel per layer and iteration; the mean, 1, is white.

    Args:
        run: with its metrics.
        names: those called `load/iteration_T/layer_L`.
    """
    places = [tuple(map(int, re.findall(r"\d+", name))) for name in names]
    layers = sorted({layer for _, layer in places})
    chosen = np.linspace(0, len(layers) - 1, min(len(layers), LAYERS_SHOWN)).round()
    layers = [layers[int(index)] for index in chosen]
    iterations = sorted({t for t, _ in places})
    figure = new_figure(1.2 + 3.2 * len(iterations), 0.6 + 1.5 * len(layers))
    style = {"vmin": 0, "vmax": 2, "cmap": "RdBu_r", "rasterized": True}
    panels = figure.subplots(len(layers), len(iterations), squeeze=False, sharex=True, sharey=True)
    for layer, row in zip(layers, panels, strict=True):
        for t, axes in zip(iterations, row, strict=True):
            steps, loads = zip(*run.values(f"load/iteration_{t}/layer_{layer}"), strict=True)
            loads_NS = np.array(loads).T
            experts = np.arange(len(loads_NS) + 1) - 0.5
            image = axes.pcolormesh(_edges(steps), experts, loads_NS * len(loads_NS), **style)
            axes.set_title(f"layer {layer}, iteration {t}", fontsize="small")
        row[0].set(ylabel="expert")
    for axes in panels[-1]:
        axes.set(xlabel="step")
    bar = figure.colorbar(image, ax=list(panels.flat), label="load / mean (2: 2 or more)")
    assert bar.solids is not None
    bar.solids.set_rasterized(True)
    return figure


def _routing_panels(recorded: Sequence[str]) -> Iterator[Panel]:
    """Yield a panel for each metric recorded by iteration as a mean over layers."""
    metrics = [*_ROUTING]
    losses = dict.fromkeys(name.split("/")[1] for name in recorded if name.startswith("balance/"))
    metrics += [(f"balance/{loss}", loss.replace("_", " ")) for loss in losses]
    for metric, title in metrics:
        parts = ((name, re.fullmatch(rf"{metric}/iteration_(\d+)", name)) for name in recorded)
        names = {f"iteration {part[1]}": name for name, part in parts if part}
        if names:
            yield Panel(title, names)


def _edges(steps: Sequence[float]) -> list[float]:
    """Return the edges of a heatmap's columns: each ends at its step, where the next begins."""
    first = 2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1
    return [first, *steps]
