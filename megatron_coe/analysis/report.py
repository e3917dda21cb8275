"""The report of a run: a self-contained HTML file that loads nothing from the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from megatron_coe.analysis.loss_curves import Group, describe_end, plot_losses
from megatron_coe.analysis.plotting import inline_svg
from megatron_coe.analysis.results import RANDOM, Analysis
from megatron_coe.analysis.runs import Run
from megatron_coe.analysis.training_curves import training_plots
from megatron_coe.config.schedules import batch_schedule
from megatron_coe.utils.environment import read_machine
from megatron_coe.utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANSWERS_FILE = "answers.txt"
"""Samples of a run's text, as `make quickstart` leaves them."""


@dataclass(frozen=True)
class Plot:
    """A plot on the page.

    Attributes:
        svg: of `inline_svg`.
        caption: its description.
        wide: whether it needs the full width of the page.
    """

    svg: str
    caption: str
    wide: bool


def write_report(run: Run, output: Path, analysis: Analysis | None = None) -> None:
    """Write the report of a run; everything in it that comes from files is escaped.

    Args:
        run: to report on.
        output: HTML file.
        analysis: of its routing; None: the page names the command for it.

    Raises:
        ValueError: the run's settings are broken, or matplotlib is missing.
        OSError: they cannot be read, or the report cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    answers = run.metrics.parent / ANSWERS_FILE
    page = environment.get_template("report.html").render(
        name=run.name,
        end=describe_end(Group(run.name, (run,))),
        summary=list(_summary(run)),
        curves=list(_curves(run)),
        analysis=analysis and analysis.about,
        transitions=analysis.shown(analysis.transitions) if analysis else [],
        routers=analysis.shown(analysis.routers) if analysis else [],
        heatmaps=list(_heatmaps(analysis)) if analysis else [],
        last=_last_metrics(run),
        machine=read_machine(run.metrics.parent),
        config=run.settings.to_yaml(),
        answers=answers.read_text(encoding="utf-8") if answers.is_file() else None,
    )
    with atomic_path(output) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _summary(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the main facts of a run, by name."""
    settings = run.settings
    done = int(run.records[-1]["step"]) if run.records else 0
    yield "steps", f"{done:,} of {settings.train.steps:,}"
    yield "sequences per step", str(batch_schedule(settings.train))
    yield "seed", f"{settings.train.seed}"
    model = settings.model
    for name, label in (
        ("coe_iterations", "iterations C"),
        ("moe_router_topk", "experts per token K"),
        ("num_moe_experts", "routed experts N"),
        ("num_layers", "layers"),
        ("hidden_size", "channels"),
    ):
        if name in model:
            yield label, f"{model[name]}"


def _curves(run: Run) -> Iterator[Plot]:
    losses = plot_losses([Group(run.name, (run,))])
    yield _plot(losses, "losses", "Training and validation loss over steps.")
    for name, figure, caption in training_plots(run):
        yield _plot(figure, name, caption)


def _heatmaps(analysis: Analysis) -> Iterator[Plot]:
    for name, figure in analysis.plots():
        yield _plot(figure, name, _caption(name))


def _caption(name: str) -> str:
    kind, _, model = name.partition("_")
    model = model.replace("_layer-", ", layer ").replace(RANDOM, "initial weights (control)")
    text = {
        "coactivation": "Co-activation: tokens by their expert at an iteration (rows) and at the "
        "next (columns), and how many more than independent assignments would give",
        "usage": "Load of every expert over the mean",
        "consistency": "Experts that tokens some way apart have in common, over chance",
        "information": "Mutual information of the assignments at one iteration and the next, over "
        "that of shuffled tokens",
        "training": "Specialization over the run's checkpoints",
    }[kind]
    return f"{text}: {model}." if model else f"{text}."


def _plot(figure: Figure, name: str, caption: str) -> Plot:
    width, _ = figure.get_size_inches()
    return Plot(inline_svg(figure, name, caption), caption, wide=width > 8)


def _last_metrics(run: Run) -> Sequence[tuple[str, str, str]]:
    """Return the last value of every metric that the run recorded, and its step."""
    newest: dict[str, tuple[float, float]] = {}
    for record in run.records:
        newest |= {
            key: (record["step"], value)
            for key, value in record.items()
            if key != "step" and not isinstance(value, list)  # loads have heatmaps
        }
    return [(key, f"{value:,.6g}", f"{step:,}") for key, (step, value) in sorted(newest.items())]
