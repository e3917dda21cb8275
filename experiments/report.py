"""The report of an experiment: a table, a plot and a verdict, for people and for programs."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.claims import Contrast, Finding, Results, overall
from experiments.learning_rates import best_rate
from experiments.measure import Sizes
from experiments.plans import Experiment
from megatron_coe.analysis.intervals import Interval, spread
from megatron_coe.analysis.loss_curves import Group, plot_losses
from megatron_coe.analysis.plotting import save
from megatron_coe.analysis.runs import Run
from megatron_coe.utils.files import atomic_path
from megatron_coe.utils.tables import markdown_table

TABLE, TABLE_CSV, PLOT = "table.md", "table.csv", "plot.png"
VERDICT, VERDICT_JSON = "verdict.md", "verdict.json"
RATES, COSTS = "learning_rates.md", "costs.md"


@dataclass(frozen=True)
class Outcome:
    """The results of an experiment."""

    experiment: Experiment
    scale: str
    seeds: Sequence[int]
    sizes: Mapping[str, Sizes]
    runs: Mapping[str, Sequence[Run]]
    """A variant's runs, one for each seed."""
    losses: Mapping[str, Sequence[float]]
    tuning: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    """Where each variant has its own learning rate: loss by variant and learning rate tried."""

    def findings(self) -> list[Finding]:
        """Judge each claim."""
        state = {name: sizes.state for name, sizes in self.sizes.items()}
        memory = {name: sizes.memory for name, sizes in self.sizes.items()}
        results = Results(self.losses, state, memory)
        return [claim.judge(results) for claim in self.experiment.claims]


def write_report(outcome: Outcome, folder: Path) -> list[Path]:
    """Write table, plot and verdict of an experiment into `folder`, and return their paths.

    Raises:
        ValueError: matplotlib is missing.
        OSError: a file cannot be written.
    """
    texts = {}
    if outcome.tuning:
        texts = {RATES: rates_table(outcome), COSTS: costs_table(outcome)}
    texts |= {
        TABLE: table(outcome),
        TABLE_CSV: table_csv(outcome),
        VERDICT: verdict(outcome),
        VERDICT_JSON: verdict_json(outcome),
    }
    for name, text in texts.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    groups = [
        Group(variant.title, tuple(outcome.runs[variant.name]))
        for variant in outcome.experiment.variants
    ]
    title = f"{outcome.experiment.name}, {outcome.scale}: {len(outcome.seeds)} seed(s) each"
    figure = plot_losses(groups, "steps", ["validation"], title)
    save(figure, folder / PLOT)
    return [folder / name for name in (*texts, PLOT)]


def sizes_table(experiment: Experiment, sizes: Mapping[str, Sizes]) -> str:
    """Render the planned sizes of the variants as Markdown."""
    head = ["variant", "preset", "parameters", "active", "MFLOP/token", "state, MiB", "memory, MiB"]
    rows = [
        [
            variant.title,
            variant.name,
            *(f"{n:,}" for n in (sizes[variant.name].params, sizes[variant.name].active_params)),
            f"{sizes[variant.name].flops_per_token / 1e6:,.2f}",
            *(f"{n / 2**20:,.1f}" for n in (sizes[variant.name].state, sizes[variant.name].memory)),
        ]
        for variant in experiment.variants
    ]
    return markdown_table(head, rows)


def table(outcome: Outcome) -> str:
    """Render the costs and the losses of each variant as Markdown."""
    head = ["variant", "parameters", "active", "MFLOP/token", "state, MiB", "memory, MiB"]
    head += [*(f"seed {seed}" for seed in outcome.seeds), "mean ± std", "paper"]
    rows = []
    for variant in outcome.experiment.variants:
        sizes, losses = outcome.sizes[variant.name], outcome.losses[variant.name]
        costs = [f"{sizes.params / 1e6:,.3f} M", f"{sizes.active_params / 1e6:,.3f} M"]
        costs += [
            f"{sizes.flops_per_token / 1e6:,.2f}",
            *(f"{n / 2**20:,.1f}" for n in (sizes.state, sizes.memory)),
        ]
        reported = outcome.experiment.reported.get(variant.name, "")
        rows.append(
            [variant.title, *costs, *(f"{loss:.4f}" for loss in losses), spread(losses), reported]
        )
    return markdown_table(head, rows) + "\n"


def rates_table(outcome: Outcome) -> str:
    """Render the loss of each learning rate tried, the chosen ones in bold, as Markdown."""
    rates = sorted({rate for losses in outcome.tuning.values() for rate in losses})
    rows = []
    for variant in outcome.experiment.variants:
        losses = outcome.tuning[variant.name]
        best = best_rate(losses)
        cells = [f"{losses[rate]:.4f}" if rate in losses else "" for rate in rates]
        marked = zip(rates, cells, strict=True)
        rows.append([variant.title, *(f"**{c}**" if r == best else c for r, c in marked)])
    return markdown_table(["variant", *(f"{rate:g}" for rate in rates)], rows) + "\n"


def costs_table(outcome: Outcome) -> str:
    """Render what each compared pair loses or gains, and pays, as Markdown.

    Seconds are those of the machine that trained, other work on it included; their ratio is a mean
    over seeds with its 95% interval.
    """
    titles = {variant.name: variant.title for variant in outcome.experiment.variants}
    rows = []
    for claim in outcome.experiment.claims:
        if not isinstance(claim, Contrast) or sorted(claim.weights.values()) != [-1, 1]:
            continue
        one, other = sorted(claim.weights, key=lambda name: -claim.weights[name])
        differences = [
            mine - theirs
            for mine, theirs in zip(outcome.losses[one], outcome.losses[other], strict=True)
        ]
        seconds = [
            mine.records[-1]["seconds"] / theirs.records[-1]["seconds"]
            for mine, theirs in zip(outcome.runs[one], outcome.runs[other], strict=True)
        ]
        sizes = outcome.sizes[one], outcome.sizes[other]
        rows.append(
            [
                f"{titles[one]} : {titles[other]}",
                _interval(differences, "+.4f"),
                f"{sizes[0].flops_per_token / sizes[1].flops_per_token:.3f}",
                f"{sizes[0].state / sizes[1].state:.3f}",
                _interval(seconds, ".2f"),
            ]
        )
    head = ["pair", "loss (95% interval)", "FLOPs a token", "bytes of state", "seconds"]
    return markdown_table(head, rows) + "\n"


def _interval(values: Sequence[float], form: str) -> str:
    interval = Interval.of(values)
    return f"{interval.mean:{form}} ({interval.low:{form}} … {interval.high:{form}})"


def table_csv(outcome: Outcome) -> str:
    """Render the costs and the losses as CSV, one line for each variant."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = [f"loss_seed_{seed}" for seed in outcome.seeds]
    names = ["variant", "title", "params", "active_params", "flops_per_token", "tokens"]
    names += ["state_bytes", "memory_bytes"]
    writer.writerow([*names, *seeds, "loss_mean", "loss_std"])
    for variant in outcome.experiment.variants:
        sizes, losses = outcome.sizes[variant.name], outcome.losses[variant.name]
        deviation = statistics.stdev(losses) if len(losses) > 1 else ""
        costs = vars(sizes).values()
        mean = statistics.mean(losses)
        writer.writerow([variant.name, variant.title, *costs, *losses, mean, deviation])
    return text.getvalue()


def verdict(outcome: Outcome) -> str:
    """Render the paper's claim and the finding of each part of it as Markdown."""
    findings = outcome.findings()
    head = ["claim", "criterion", "measured", "verdict"]
    rows = [
        [
            f"{'(control) ' if finding.control else ''}{finding.claim}",
            finding.criterion,
            finding.measured,
            finding.verdict.value,
        ]
        for finding in findings
    ]
    return (
        f"**{overall(findings).value}**: {outcome.experiment.claim}\n\n"
        f"Scale {outcome.scale}, seeds {', '.join(map(str, outcome.seeds))}; losses in nats per "
        f"token, differences seed by seed.\n\n{markdown_table(head, rows)}\n"
    )


def verdict_json(outcome: Outcome) -> str:
    """Render the verdict, findings, losses and sizes as JSON."""
    findings = outcome.findings()
    described = {
        "experiment": outcome.experiment.name,
        "claim": outcome.experiment.claim,
        "scale": outcome.scale,
        "seeds": list(outcome.seeds),
        "verdict": overall(findings).value,
        "claims": [{**vars(finding), "verdict": finding.verdict.value} for finding in findings],
        "losses": {name: list(values) for name, values in outcome.losses.items()},
        "learning_rates": {name: best_rate(tried) for name, tried in outcome.tuning.items()},
        "sizes": {name: vars(sizes) for name, sizes in outcome.sizes.items()},
    }
    return json.dumps(_without_infinities(described), indent=2) + "\n"


def _without_infinities(value: object) -> object:
    """Replace infinity and NaN, which JSON lacks and single seeds give, by None."""
    if isinstance(value, dict):
        return {key: _without_infinities(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
