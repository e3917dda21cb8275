"""Results as JSON with every sample, as Markdown tables, and compared with the targets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.timing import Samples, Spread
from megatron_coe.utils.environment import machine as machine_of
from megatron_coe.utils.tables import markdown_table


@dataclass
class Outcome:
    """The results of a benchmark."""

    benchmark: str
    title: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    figures: dict[str, Spread] = field(default_factory=dict)
    """Ratios by the names that `TARGETS` use."""
    samples: Samples = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)
    """Further entries of the JSON file."""
    further: list[Outcome] = field(default_factory=list)
    """More tables of the same benchmark."""

    def markdown(self) -> str:
        """Render the title and the table, then the further ones."""
        parts = [f"**{self.title}**", "", markdown_table(self.header, self.rows)]
        for other in self.further:
            parts += ["", other.markdown()]
        return "\n".join(parts)


@dataclass(frozen=True)
class Target:
    """A target of a ratio, with its bounds on a CPU and on a GPU; None: there is no such target."""

    title: str
    figure: str
    must: tuple[float | None, float | None]
    stretch: tuple[float | None, float | None]
    command: str
    """The benchmark that measures it, as `--what` takes it."""
    at_most: bool = True
    """Whether lower is better."""

    def bounds(self, on_gpu: bool) -> tuple[float | None, float | None]:
        """Return (must, stretch) on a GPU or a CPU."""
        return self.must[on_gpu], self.stretch[on_gpu]


TARGETS = (
    Target(
        "step of CoE-2(4/64), time over --against's",
        "against coe",
        (None, 0.61),
        (None, 0.45),
        "step",
    ),
    Target(
        "step of MoE(8/64), time over --against's",
        "against moe",
        (None, 0.61),
        (None, 0.45),
        "step",
    ),
    Target("peak memory over --against's", "against memory", (None, 0.60), (None, 0.45), "memory"),
    Target(
        "output layer and loss, time over its three products'",
        "head",
        (None, 1.5),
        (None, 1.2),
        "head",
    ),
    Target(
        "routed experts' rate / dense matmul's (on a GPU: an 8192-cubed product's)",
        "experts",
        (0.65, 0.55),
        (0.80, 0.70),
        "experts",
        at_most=False,
    ),
    Target(
        "the 8192-cubed product's rate / the data sheet's",
        "square",
        (None, 0.72),
        (None, 0.80),
        "experts",
        at_most=False,
    ),
    Target("step time CoE-2(4/64) / MoE(8/64)", "step", (1.10, 1.06), (1.06, 1.05), "step"),
    Target("step time CoE-2(3+1) / MoE(7+1)", "matched", (1.07, 1.03), (1.03, 1.015), "matched"),
    Target(
        "CoE layer: speed-up over stock MoELayer + SequentialMLP called C times",
        "layer",
        (1.2, 1.5),
        (1.5, 2.3),
        "layer",
        at_most=False,
    ),
    Target("peak memory CoE / MoE", "memory", (1.07, 1.07), (1.04, 1.04), "memory"),
    Target(
        "tokens/s with Transformer Engine / without",
        "te",
        (None, 1.0),
        (None, 1.1),
        "step, by --te-path",
        at_most=False,
    ),
    Target(
        "tokens/s in FP8 / in bf16",
        "fp8",
        (None, 1.15),
        (None, 1.15),
        "step, by --te-path",
        at_most=False,
    ),
    Target(
        "tokens/s deterministic / not",
        "deterministic",
        (None, 0.95),
        (None, 1.0),
        "step --vary train.deterministic=off,on",
        at_most=False,
    ),
    Target("host syncs per step", "host_syncs", (None, 1), (None, 0), "host_syncs"),
    Target(
        "seconds for 1,000 steps of CoE-2(4/64), V = 102,400, one H200",
        "long",
        (None, 130.0),
        (None, 100.0),
        "long --scale paper",
    ),
    Target(
        "EP > 1: exposed share of communication in a step",
        "parallel",
        (None, 0.10),
        (None, 0.05),
        "parallel, under torchrun",
    ),
    Target(
        "tokens/s over transformers' deepseek_v2 MoE(8/64) with grouped_mm, fp32",
        "transformers",
        (1.2, None),
        (1.5, None),
        "transformers",
        at_most=False,
    ),
)


def target_table(figures: dict[str, Spread], on_gpu: bool) -> str:
    """Render every target beside its measured ratio, if it was measured."""
    rows = []
    for target in TARGETS:
        must, stretch = target.bounds(on_gpu)
        found = figures.get(target.figure)
        verdict = ""
        if found is None:
            gpu_only = must is None and not on_gpu
            shown = "not measured" + (" (needs a GPU)" if gpu_only else "")
        else:
            shown = found.text()
            verdict = _verdict(found.median, must, stretch, target.at_most)
        sign = "<=" if target.at_most else ">="
        bounds = [f"{sign} {bound:g}" if bound is not None else "" for bound in (must, stretch)]
        rows.append([target.title, *bounds, shown, verdict, f"`--what {target.command}`"])
    return markdown_table(["ratio", "must", "stretch", "measured", "", "command"], rows)


def _verdict(value: float, must: float | None, stretch: float | None, at_most: bool) -> str:
    def reached(bound: float | None) -> bool:
        return bound is not None and (value <= bound if at_most else value >= bound)

    if must is None:
        return ""
    return "stretch" if reached(stretch) else "must" if reached(must) else "missed"


def machine(device: torch.device) -> dict[str, object]:
    """Return the machine, the threads, and the load averages."""
    load = [round(load, 2) for load in os.getloadavg()]
    return {**machine_of(device), "threads": torch.get_num_threads(), "load": load}


def write_json(path: Path, heading: dict[str, object], outcomes: list[Outcome]) -> None:
    """Write the heading and the outcomes, with every sample."""
    document = {**heading, "outcomes": [asdict(outcome) for outcome in outcomes]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")


def write_processes(path: Path, documents: Mapping[str, Sequence[Mapping[str, object]]]) -> None:
    """Write the documents of benchmarks that ran in processes of their own, by part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(documents, indent=1) + "\n", encoding="utf-8")
