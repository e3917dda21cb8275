r"""Screen designs of a chain against the standard MoE, in plain torch and at a small size.

    python tools/screen_designs.py --seeds 3 --results docs/experiments/screen_tiny.jsonl
    python tools/screen_designs.py --designs moe stream --seeds 8 --results screen.jsonl
    python tools/screen_designs.py --report --results docs/experiments/screen_tiny.jsonl

Each design (`experiments.designs`) is trained on the text and with the budget of the experiment
`fair`, at a learning rate of its own as there, by one process and thread; a result is kept as its
run ends, and not computed again. Prints the differences to the standard MoE, seed by seed. A design
that gains more than its interval is worth a place in the product; the others are rows of
docs/log.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coe.cli.command_line import new_parser, required, run

with required():
    from experiments.command import add_source_arguments, source_of
    from experiments.data import Data, Source, make_data
    from experiments.plans import Variant
    from experiments.scales import SCALES, Scale

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from experiments.designs import Design
    from experiments.run_results import RunResult
    from megatron_coe.config.run_config import Settings

MODEL = Variant("moe_8-64_outer", "")
"""What the designs do not decide is this preset's."""


def main() -> int:
    """Train the designs that the command line names and compare them; return an exit status."""
    return run(lambda: command(parse()), "interrupted; the runs that ended are kept")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--designs", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 1, 2, … (default 3)")
    parser.add_argument("--tuning-seeds", type=int, default=1, help="default 1")
    add_source_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--results", type=Path, required=True, metavar="FILE")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def command(options: argparse.Namespace) -> None:
    """Train what has no result yet, and print the table.

    Raises:
        ValueError: an option is invalid.
        OSError: a file cannot be read or written.
    """
    from experiments.designs import DESIGNS
    from experiments.learning_rates import best_rate, search
    from experiments.tuned import FIRST_TUNING_SEED, REPORT, TUNING, mean_losses

    names = options.designs or list(DESIGNS)
    for name in names:
        if name not in DESIGNS:
            raise ValueError(f"--designs {name}: there are {', '.join(DESIGNS)}")
    scale = SCALES[options.scale]
    source = source_of(options, scale)
    screen = Screen(scale, source, options.output, options.overrides, options.results)
    if not options.report:
        screen.make_data()
        tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
        # Design by design, so that an interrupted screen has finished ones.
        for name in names:
            losses = search(
                {name: screen.scale_rate},
                lambda grids: mean_losses(
                    screen.train(name, lr, seed, TUNING)
                    for name, grid in grids.items()
                    for seed in tuning_seeds
                    for lr in grid
                ),
            )
            for seed in range(1, options.seeds + 1):
                screen.train(name, best_rate(losses[name]), seed, REPORT)
    print("\n" + table(screen.results.read().values(), names, options.seeds))


class Screen:
    """Runs at a scale, and the file that keeps their results."""

    def __init__(
        self, scale: Scale, source: Source, output: Path, overrides: list[str], results: Path
    ) -> None:
        from experiments.run_results import ResultsFile

        self.scale, self.source, self.overrides = scale, source, overrides
        self.folder = output / source.name / "data"
        self.results = ResultsFile(results)

    def make_data(self) -> None:
        """Make the text, unless it exists."""
        make_data(self.source, self.folder)

    @property
    def scale_rate(self) -> float:
        """The scale's learning rate, around which a grid begins."""
        return self.settings(1, None, "report").train.lr

    def settings(self, seed: int, lr: float | None, held_out: str) -> Settings:
        """Return the settings of a run: those of `fair`."""
        from experiments.tuned import TUNING, VALIDATION

        data = Data.at(self.folder)
        rows = data.tuning if held_out == TUNING else data.report
        rates = [f"train.lr={lr:g}", f"train.min_lr={lr / 10:g}"] if lr else []
        overrides = [*VALIDATION, *self.overrides, *rates]
        run = self.folder.parent / "screen"
        return self.scale.settings_of(MODEL, seed, run, replace(data, valid=rows), overrides)

    def train(self, name: str, lr: float, seed: int, held_out: str) -> RunResult:
        """Train a design unless its result is there; return the result.

        Raises: ValueError: the result is of other settings.
        """
        from experiments.designs import DESIGNS
        from experiments.run_results import settings_digest

        settings = self.settings(seed, lr, held_out)
        digest = settings_digest(settings, [held_out, self.source.described()])
        before = self.results.read().get((name, lr, seed, held_out))
        if before is not None and before.settings != digest:
            raise ValueError(f"{self.results.path}: {name}, seed {seed}, is of other settings")
        if before is not None:
            return before
        result = train(DESIGNS[name], settings, held_out, digest)
        self.results.append(result)
        print(
            f"{name}, lr {lr:g}, seed {seed}: {result.loss:.4f}, {result.seconds:.0f} s", flush=True
        )
        return result


def train(design: Design, settings: Settings, held_out: str, digest: str) -> RunResult:
    """Train a design, and return its result."""
    import torch
    from transformers.utils import logging

    from experiments.designs import build_model, layers_of
    from experiments.run_results import RunResult
    from megatron_coe.conversion.hf_config import to_hf_config
    from megatron_coe.conversion.stored_model import provider_of
    from megatron_coe.hf import CoeConfig
    from megatron_coe.utils.environment import commit

    logging.set_verbosity_error()  # about positions beyond those of training
    torch.set_num_threads(1)
    torch.manual_seed(settings.train.seed)
    model = build_model(CoeConfig(**to_hf_config(provider_of(settings))), design)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=(settings.train.adam_beta1, settings.train.adam_beta2),
        eps=settings.train.adam_eps,
        weight_decay=settings.train.weight_decay,
    )
    training, validation = datasets(settings)
    coefficient = settings.model["moe_aux_loss_coeff"]
    began_s = time.perf_counter()
    batches = batches_of(training, settings.train.global_batch_size)
    for step in range(1, settings.train.steps + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step)
        tokens, labels, mask = next(batches)
        loss = cross_entropy(model, tokens, labels, mask).sum() / mask.sum()
        aux_loss = coefficient * sum(layer.aux_loss for layer in layers_of(model))
        (loss + aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.train.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        passes = sum(layer.passes for layer in layers_of(model)) / len(layers_of(model))
    seconds = time.perf_counter() - began_s
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for tokens, labels, mask in batches_of(validation, settings.train.global_batch_size):
            total += cross_entropy(model, tokens, labels, mask).sum().item()
            count += mask.sum().item()
    losses = ((settings.train.steps, round(total / count, 6)),)
    key = (design.name, settings.train.lr, settings.train.seed, held_out)
    return RunResult(*key, losses, round(seconds, 1), digest, commit(), round(passes, 3))


def datasets(settings: Settings) -> tuple[Dataset, Dataset]:
    """Return the training and the held-out sequences, those of a run of the product."""
    from megatron_coe.data.datasets import build_datasets
    from megatron_coe.data.tokenizer import load_tokenizer

    train = settings.train
    training, held_out = build_datasets(
        train=settings.data.train,
        valid=settings.data.valid,
        tokenizer=load_tokenizer(settings.data.tokenizer),
        seq_length=settings.model["seq_length"],
        mode="packed",
        num_samples=(train.steps * train.global_batch_size, train.eval_samples),
        seed=train.seed,
    )
    assert held_out is not None
    return training, held_out


def batches_of(dataset: Dataset, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield tokens, labels and loss mask [B, S] of the sequences in order."""
    from torch.utils.data import DataLoader

    for batch in DataLoader(dataset, size):
        yield batch["tokens"], batch["labels"], batch["loss_mask"]


def cross_entropy(model, tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # torch is imported late
    """Return the cross-entropy of each position [B, S], 0 where it is masked."""
    import torch.nn.functional as F

    logits = model(input_ids=tokens).logits
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(mask) * mask


def learning_rate(settings: Settings, step: int) -> float:
    """Return the learning rate of a step, as Megatron's scheduler has it."""
    from megatron_coe.config.schedules import lr_spans

    train, warmup = settings.train, lr_spans(settings.train).warmup
    if step <= warmup:
        return train.lr * step / warmup
    if train.lr_decay_style == "constant":
        return train.lr
    done = (step - warmup) / (train.steps - warmup)
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * done)) / 2


def table(results: Iterable[RunResult], names: list[str], seeds: int) -> str:
    """Render each design's losses and differences to the standard MoE as Markdown."""
    import statistics

    from experiments.designs import DESIGNS
    from megatron_coe.analysis.intervals import Interval
    from megatron_coe.utils.tables import markdown_table

    found: dict[str, dict[int, RunResult]] = {}
    for result in results:
        if result.held_out == "report" and result.seed <= seeds:
            found.setdefault(result.variant, {})[result.seed] = result
    baseline = found.get("moe", {})
    rows = []
    for name in (name for name in names if name in found):
        own = found[name]
        common = sorted(own.keys() & baseline.keys())
        differences = [own[seed].loss - baseline[seed].loss for seed in common]
        cells = ["", ""]
        if name != "moe" and differences:
            interval = Interval.of(differences)
            cells = [f"{interval.mean:+.4f}", f"{interval.low:+.4f} … {interval.high:+.4f}"]
        passes = statistics.mean(result.passes or 0 for result in own.values())
        loss = statistics.mean(result.loss for result in own.values())
        rows.append([DESIGNS[name].title, f"{passes:.2f}", f"{len(own)}", f"{loss:.4f}", *cells])
    head = ["design", "passes a token", "seeds", "loss", "to the standard MoE", "95% interval"]
    return markdown_table(head, rows)
