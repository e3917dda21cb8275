"""Plots of routing: co-activation, expert load, neighbors, mutual information, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_coe.analysis.plotting import COLORS, colors, new_figure
from megatron_coe.analysis.routing import Floats, Ints, expected_coactivation
from megatron_coe.analysis.routing_tables import DISTANCES, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


@dataclass(frozen=True)
class CoactivationScale:
    """The color scale of co-activation heatmaps: one for all that stand side by side.

    Attributes:
        most: tokens in a cell.
        excess: tokens in a cell more, or fewer, than independent assignments give.
    """

    most: float
    excess: float

    @staticmethod
    def of(matrices: Iterable[Ints]) -> CoactivationScale:
        """Return the scale that holds all of the matrices [N, N]."""
        found = [(matrix.max(), np.abs(_excess(matrix)).max()) for matrix in matrices]
        return CoactivationScale(*(float(value) for value in np.max(found, axis=0)))


def coactivation_heatmap(
    title: str, layer: int, matrices: Sequence[Ints], scale: CoactivationScale | None = None
) -> Figure:
    """Draw a layer's co-activation matrices [N, N], a row of panels for each pair of iterations.

    Rows are experts at t, columns at t + 1. The left panel counts tokens; the right one subtracts
    the counts of independent assignments, so that the load of experts does not show.

    Args:
        title: of the model.
        layer: its number.
        matrices: one for each pair of iterations.
        scale: of the colors; None: that of these matrices.
    """
    scale = scale or CoactivationScale.of(matrices)
    figure = new_figure(8, 0.4 + 3 * len(matrices))
    panels = figure.subplots(len(matrices), 2, squeeze=False)
    counts = {"vmin": 0, "vmax": scale.most, "cmap": "viridis"}
    excess = {"vmin": -scale.excess, "vmax": scale.excess, "cmap": "RdBu_r"}
    for t, (line, matrix) in enumerate(zip(panels, matrices, strict=True), start=1):
        images = [
            axes.imshow(values, interpolation="nearest", **colors)
            for axes, values, colors in zip(
                line, (matrix, _excess(matrix)), (counts, excess), strict=True
            )
        ]
        for axes in line:
            axes.set(xlabel=f"expert at iteration {t + 1}", ylabel=f"expert at iteration {t}")
    for number, label in enumerate(("tokens", "tokens beyond independent assignments")):
        _colorbar(figure, images[number], panels[:, number], label)
    figure.suptitle(f"{title}, layer {layer}", fontsize="medium")
    return figure


def _excess(matrix: Ints) -> Floats:
    return matrix - expected_coactivation(matrix)


def usage_heatmap(name: str, rows: Sequence[Row], experts: int) -> Figure:
    """Draw the load of every expert over the mean, a row of cells for each layer and iteration.

    Args:
        name: of the model.
        rows: of `usage_rows`.
        experts: N.
    """
    loads = np.array([row["share"] for row in rows]).reshape(-1, experts) * experts
    places = [(row["layer"], row["iteration"]) for row in rows[::experts]]
    height, size = (0.24, 8) if len(places) <= 24 else (0.13, 5)
    figure = new_figure(7, 1.3 + height * len(places))
    axes = figure.subplots()
    image = axes.imshow(
        loads, vmin=0, vmax=2, cmap="RdBu_r", aspect="auto", interpolation="nearest"
    )
    labels = [f"layer {layer}, iteration {t}" for layer, t in places]
    axes.set_yticks(range(len(labels)), labels, fontsize=size)
    axes.set(xlabel="expert")
    axes.set_title(f"{name}: load of each expert", fontsize="medium")
    _colorbar(figure, image, [axes], "load / mean (2: 2 or more)")
    return figure


def consistency_plot(name: str, rows: Sequence[Row]) -> Figure:
    """Plot the expert overlap of tokens over their distance, relative to chance.

    Args:
        name: of the model.
        rows: of `router_rows`.
    """

    def draw(axes: Axes, row: Row, style: dict) -> None:
        excess = [row[f"consistency_{d}"] / row["consistency_by_chance"] for d in DISTANCES]
        axes.plot(DISTANCES, excess, marker="o", markersize=3, **style)

    figure = _panel_per_iteration(rows, draw)
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(DISTANCES, [str(distance) for distance in DISTANCES])
        axes.set(xlabel="tokens apart")
        axes.axhline(1, color="gray", linestyle="--", linewidth=1)
    figure.axes[0].set(ylabel="experts in common / by chance")
    figure.suptitle(f"{name}: local routing consistency", fontsize="medium")
    return figure


def information_plot(rows: Sequence[Row]) -> Figure:
    """Plot the mutual information of assignments at t and t + 1, by model.

    The left panel subtracts that of shuffled tokens; the right one that of tokens shuffled among
    those of the same id, which leaves the part that the id does not explain.

    Args:
        rows: of `transition_rows`, of one or several models.
    """
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    places = list(dict.fromkeys((row["layer"], row["iteration"]) for row in rows))
    figure = new_figure(min(max(9.0, 2 + 1.4 * len(places)), 18.0), 3.6)
    width = 0.8 / len(models)
    panels = zip(figure.subplots(1, 2, sharey=True), _INFORMATION.items(), strict=True)
    for axes, (null, title) in panels:
        for number, model in enumerate(models):
            of_model = [row for row in rows if row["model"] == model]
            at = np.arange(len(places)) + (number - (len(models) - 1) / 2) * width
            _draw_bars(axes, at, width, of_model, null, number)
        labels = [f"layer {layer}\n{t} → {t + 1}" for layer, t in places]
        every = 1 + (len(places) - 1) // 12  # labels that have room
        axes.set_xticks(range(0, len(places), every), labels[::every], fontsize="small")
        axes.set_title(title, fontsize="medium")
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set(ylabel="mutual information (nats)")
    figure.axes[1].legend(fontsize="small")
    return figure


def _draw_bars(
    axes: Axes, at: Floats, width: float, of_model: Sequence[Row], null: str, number: int
) -> None:
    """Draw a model's information above its null hypothesis, and the largest of the shuffles."""
    heights = [row[f"{null}_excess"] for row in of_model]
    color = COLORS[number % len(COLORS)]
    axes.bar(at, heights, width, label=str(of_model[0]["model"]), color=color)
    levels = [row[f"{null}_largest_by_chance"] - row[f"{null}_by_chance"] for row in of_model]
    label = "largest by chance" if number == 0 else None
    style: dict[str, Any] = {"linestyle": "none", "marker": "_", "markersize": 12}
    axes.plot(at, levels, label=label, color="#000000", **style)


_INFORMATION = {
    "any_token": "one iteration and the next",
    "same_token": "beyond what the token's id explains",
}


def training_plot(
    routers: Sequence[Row], transitions: Sequence[Row], training: Sequence[Row]
) -> Figure:
    """Plot specialization over checkpoints: a panel per metric, a line per layer.

    Lines are means over iterations.

    Args:
        routers: of `router_rows`, of checkpoints in order of time.
        transitions: of `transition_rows`, likewise.
        training: of `training_rows`.
    """
    panels: list[tuple[str, Sequence[Row], Callable[[Row], float]]] = [
        ("load entropy / log N", routers, lambda row: row["entropy"]),
        ("expert and token id: information (nats)", routers, lambda row: row["token_excess"]),
        ("share of the last one's experts", training, lambda row: row["saturation"]),
    ]
    if transitions:
        panels += [
            ("iterations: information (nats)", transitions, lambda row: row["any_token_excess"]),
            ("… beyond the token's id", transitions, lambda row: row["same_token_excess"]),
            ("asymmetry of transitions", transitions, lambda row: row["asymmetry"]),
        ]
    lines = len(panels) // 3
    figure = new_figure(10, 3.2 * lines)
    for axes, (title, rows, value) in zip(figure.subplots(lines, 3).flatten(), panels, strict=True):
        _over_checkpoints(axes, rows, value)
        axes.set_title(title, fontsize="medium")
    _legend_of_layers(figure.axes[0])
    return figure


def _over_checkpoints(axes: Axes, rows: Sequence[Row], value: Callable[[Row], float]) -> None:
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    for layer, color in zip(layers, colors(len(layers)), strict=True):
        means = [
            np.mean([value(row) for row in rows if (row["model"], row["layer"]) == (model, layer)])
            for model in models
        ]
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 3}
        axes.plot(range(len(models)), means, label=f"layer {layer}", **style)
    axes.set_xticks(
        range(len(models)), [model.removeprefix("step_").lstrip("0") or "0" for model in models]
    )
    axes.set(xlabel="step")
    axes.grid(alpha=0.3)


def _panel_per_iteration(rows: Sequence[Row], draw: Callable[[Axes, Row, dict], None]) -> Figure:
    """Draw panels side by side, in each a curve per layer."""
    iterations = sorted({int(row["iteration"]) for row in rows})
    figure = new_figure(1 + 3.2 * len(iterations), 3.4)
    panels = np.atleast_1d(figure.subplots(1, len(iterations), sharey=True))
    for axes, t in zip(panels, iterations, strict=True):
        of_iteration = [row for row in rows if row["iteration"] == t]
        for row, color in zip(of_iteration, colors(len(of_iteration)), strict=True):
            draw(axes, row, {"color": color, "label": f"layer {row['layer']}"})
        axes.set_title(f"iteration {t}", fontsize="medium")
        axes.grid(alpha=0.3)
    _legend_of_layers(panels[0])
    return figure


def _legend_of_layers(axes: Axes) -> None:
    count = len(axes.get_legend_handles_labels()[1])
    axes.legend(fontsize="small" if count <= 8 else "xx-small", ncols=1 + (count - 1) // 8)


def _colorbar(figure: Figure, image: AxesImage, panels: Iterable[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=list(panels), label=label)
    assert bar.solids is not None
    bar.solids.set_rasterized(True)  # one image instead of 256 rectangles
