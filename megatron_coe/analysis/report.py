"""A run on one page: an HTML file that holds all it shows and asks nothing of the network."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import psutil
import torch

from megatron_coe.analysis.curves import Group, describe_end, plot_losses
from megatron_coe.analysis.figures import COLOURS, inline_svg, new_figure
from megatron_coe.analysis.results import RANDOM, Analysis
from megatron_coe.analysis.runs import Run
from megatron_coe.data.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANSWERS_FILE = "answers.txt"
"""Samples of a run's text, as `make quickstart` leaves them."""

PACKAGES = ("megatron-coe", "megatron-core", "torch", "transformer-engine", "transformers")

_FIGURES = (
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens per second"),
)


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        svg: as `inline_svg` makes it.
        caption: what there is to see.
        wide: whether it needs the whole width of the page.
    """

    svg: str
    caption: str
    wide: bool


def write_report(run: Run, output: Path, analysis: Analysis | None = None) -> None:
    """Write the page of a run; everything in it that comes from files is escaped.

    Args:
        analysis: of its routing; None: the page says how to get it.

    Raises: ValueError, OSError: the run's settings cannot be read, or matplotlib is missing.
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
        maps=list(_maps(analysis)) if analysis else [],
        last=_last_figures(run),
        machine=machine(),
        config=run.settings.to_yaml(),
        answers=answers.read_text(encoding="utf-8") if answers.is_file() else None,
    )
    with atomic_path(output) as temporary:
        temporary.write_text(page, encoding="utf-8")


def machine() -> list[tuple[str, str]]:
    """What this process runs on, by name."""
    memory = psutil.virtual_memory().total / 2**30
    found = [
        ("system", platform.platform()),
        ("processor", f"{_processor()}, {psutil.cpu_count()} logical cores"),
        ("memory", f"{memory:.1f} GiB"),
        ("Python", platform.python_version()),
    ]
    if torch.cuda.is_available():
        found.append(("GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"))
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Its name as Linux tells it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _summary(run: Run) -> Iterator[tuple[str, str]]:
    """What a reader asks first, by name."""
    settings = run.settings
    done = int(run.records[-1]["step"]) if run.records else 0
    yield "steps", f"{done:,} of {settings.train.steps:,}"
    per_step = settings.train.global_batch_size
    yield "sequences per step", f"{per_step:,}"
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


def _curves(run: Run) -> Iterator[Picture]:
    group = Group(run.name, (run,))
    yield _picture(plot_losses([group]), "losses", "Training and validation loss over steps.")
    there = [(key, label) for key, label in _FIGURES if run.values(key)]
    if there:
        figure = new_figure(3.4 * len(there), 2.8)
        for number, (key, label) in enumerate(there):
            axes = figure.add_subplot(1, len(there), number + 1)
            axes.plot(*zip(*run.values(key), strict=True), color=COLOURS[number], linewidth=1)
            axes.set(xlabel="step")
            axes.set_title(label, fontsize="medium")
            axes.grid(alpha=0.3)
        names = ", ".join(label for _, label in there)
        yield _picture(figure, "figures", f"Over steps: {names}.")
    if balance := _balance(run):
        figure = new_figure(7, 3.2)
        axes = figure.subplots()
        for number, key in enumerate(balance):
            label = key.removeprefix("balance/").replace("/", ", ").replace("_", " ")
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(*zip(*run.values(key), strict=True), color=colour, label=label, linewidth=1)
        axes.set(xlabel="step", ylabel="balance loss")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        caption = "Balance loss of each iteration, mean over layers; 1: all experts alike."
        yield _picture(figure, "balance", caption)


def _balance(run: Run) -> list[str]:
    """Names of the balance losses that are means over layers."""
    keys = dict.fromkeys(key for record in run.records for key in record)
    return [key for key in keys if key.startswith("balance/") and "/layer_" not in key]


def _maps(analysis: Analysis) -> Iterator[Picture]:
    for name, figure in analysis.pictures():
        yield _picture(figure, name, _caption(name))


def _caption(name: str) -> str:
    kind, _, model = name.partition("_")
    model = model.replace("_layer-", ", layer ").replace(RANDOM, "initial weights (control)")
    text = {
        "coactivation": "Co-activation: tokens by their expert at an iteration (rows) and at the "
        "next (columns)",
        "usage": "Load of every expert over the mean",
        "consistency": "Experts that tokens some way apart have in common, over chance",
        "information": "What the choice at one iteration tells of the next, over shuffled tokens",
        "training": "Specialisation over the run's checkpoints",
    }[kind]
    return f"{text}: {model}." if model else f"{text}."


def _picture(figure: Figure, name: str, caption: str) -> Picture:
    width, _ = figure.get_size_inches()
    return Picture(inline_svg(figure, name, caption), caption, wide=width > 8)


def _last_figures(run: Run) -> Sequence[tuple[str, str, str]]:
    """The newest value of everything that the run recorded."""
    newest: dict[str, tuple[float, float]] = {}
    for record in run.records:
        newest |= {key: (record["step"], value) for key, value in record.items() if key != "step"}
    return [(key, f"{value:,.6g}", f"{step:,}") for key, (step, value) in sorted(newest.items())]
