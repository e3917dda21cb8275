"""The results of a routing analysis in a folder: tables (CSV), a summary (JSON), plots (PNG)."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_coe.analysis import heatmaps
from megatron_coe.analysis.placement import Placement
from megatron_coe.analysis.plotting import save
from megatron_coe.analysis.routing import Ints
from megatron_coe.analysis.routing_tables import Row
from megatron_coe.conversion.place import PLACEMENT_FILE, write_orders
from megatron_coe.utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "summary.json"
RANDOM = "random-init"
"""Name of the control in every table."""

_TABLES = ("routers", "transitions", "training")
_MATRIX = re.compile(r"coactivation_(.+)_layer-(\d+)_iterations-(\d+)-\d+\.csv")


@dataclass
class Analysis:
    """The routing analysis of one model or several, on one text.

    Attributes:
        about: names of the models, shape, text and test.
        routers: of `routing_tables.router_rows`.
        transitions: of `routing_tables.transition_rows`.
        training: of `routing_tables.training_rows`.
        usage: of `routing_tables.usage_rows`.
        matrices: co-activation of the last model and of the control: by model and layer, one
            [N, N] for each pair of iterations.
        placements: of the last model's experts, where they were asked for; `read` leaves them out.
    """

    about: dict[str, Any]
    routers: list[Row] = field(default_factory=list)
    transitions: list[Row] = field(default_factory=list)
    training: list[Row] = field(default_factory=list)
    usage: list[Row] = field(default_factory=list)
    matrices: dict[tuple[str, int], list[Ints]] = field(default_factory=dict)
    placements: list[Placement] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write tables, summary and plots into a folder.

        Raises:
            ValueError: matplotlib is missing.
            OSError: a file cannot be written.
        """
        for name, figure in self.plots():
            save(figure, folder / f"{name}.png")
        for name in (*_TABLES, "usage"):
            _write_csv(folder / f"{name}.csv", getattr(self, name))
        for (model, layer), matrices in self.matrices.items():
            for t, matrix in enumerate(matrices, start=1):
                name = f"coactivation_{model}_layer-{layer}_iterations-{t}-{t + 1}.csv"
                with atomic_path(folder / name) as temporary:
                    np.savetxt(temporary, matrix, fmt="%d", delimiter=",")
        if self.placements:
            self._write_placements(folder)
        content = {"about": self.about, **{name: getattr(self, name) for name in _TABLES}}
        text = json.dumps(_without_nan(content), indent=1)
        with atomic_path(folder / SUMMARY) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def _write_placements(self, folder: Path) -> None:
        rows = [{k: v for k, v in vars(one).items() if k != "order"} for one in self.placements]
        _write_csv(folder / "placement.csv", rows)
        orders: dict[int, dict[int, Sequence[int]]] = {}
        for one in self.placements:
            orders.setdefault(one.ep, {})[one.layer] = one.order
        write_orders(folder / PLACEMENT_FILE, orders)

    @staticmethod
    def read(folder: Path) -> Analysis:
        """Read the analysis that `write` wrote.

        Raises:
            ValueError: the files are of something else.
            OSError: they cannot be read.
        """
        try:
            content = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            rows: dict[str, Any] = {
                name: [{key: _number(value) for key, value in row.items()} for row in content[name]]
                for name in _TABLES
            }
            usage = _read_csv(folder / "usage.csv")
            matrices = _read_matrices(folder)
            return Analysis(dict(content["about"]), **rows, usage=usage, matrices=matrices)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} holds no analysis of routing ({error})") from error

    def plots(self) -> Iterator[tuple[str, Figure]]:
        """Yield the name and the figure of each plot."""
        if self.matrices:
            scale = heatmaps.CoactivationScale.of(chain.from_iterable(self.matrices.values()))
        for (model, layer), matrices in self.matrices.items():
            name = f"coactivation_{model}_layer-{layer}"
            yield name, heatmaps.coactivation_heatmap(self.title(model), layer, matrices, scale)
        experts = int(self.about["experts"])
        for model in dict.fromkeys(str(row["model"]) for row in self.shown(self.routers)):
            rows, usage = (
                [row for row in table if row["model"] == model]
                for table in (self.routers, self.usage)
            )
            title = self.title(model)
            yield f"usage_{model}", heatmaps.usage_heatmap(title, usage, experts)
            yield f"consistency_{model}", heatmaps.consistency_plot(title, rows)
        if self.transitions:
            yield "information", heatmaps.information_plot(self.shown(self.transitions))
        if len(self.about["models"]) > 1:
            tables = (self.routers, self.transitions, self.training)
            yield "training", heatmaps.training_plot(*(_without_control(rows) for rows in tables))

    def title(self, model: str) -> str:
        """Return the title of a model of the tables: its run and its step."""
        name = "initial weights" if model == RANDOM else model
        step = model.removeprefix("step_")
        if step != model and step.isdecimal():
            name = f"step {int(step)}"
        run = self.about.get("run")  # absent from older analyses
        return f"{run}, {name}" if run and run != name else name

    def shown(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows of the last model and of the control."""
        return [row for row in rows if row["model"] in (self.about["models"][-1], RANDOM)]


def _without_control(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["model"] != RANDOM]


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["model"])
        writer.writeheader()
        writer.writerows(rows)


def _read_csv(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {key: value if key == "model" else json.loads(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def _read_matrices(folder: Path) -> dict[tuple[str, int], list[Ints]]:
    """Read the co-activation matrices by model and layer, the control last."""
    matrices: dict[tuple[str, int], list[Ints]] = {}
    found = [_MATRIX.fullmatch(path.name) for path in folder.iterdir()]
    for _, model, layer, _, name in sorted(
        (m[1] == RANDOM, m[1], int(m[2]), int(m[3]), m[0]) for m in found if m
    ):
        matrix = np.loadtxt(folder / name, dtype=np.int64, delimiter=",", ndmin=2)
        matrices.setdefault((model, layer), []).append(matrix)
    return matrices


def _without_nan(value: object) -> object:
    """Replace NaN by None, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(value: str | float | None) -> str | float:
    return math.nan if value is None else value
