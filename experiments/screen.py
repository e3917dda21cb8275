r"""Screen designs of a chain against the standard MoE, in plain torch and at a small size.

    python -m experiments.screen --seeds 3 --results docs/experiments/screen_tiny.jsonl
    python -m experiments.screen --designs moe stream --seeds 8 --results screen.jsonl
    python -m experiments.screen --report --results docs/experiments/screen_tiny.jsonl

Each design (`experiments.designs`) is trained on the text and with the budget of the experiment
`fair`, by one process and thread; a result is kept as its run ends, and not computed again. Prints
the differences to the standard MoE, seed by seed. A design that gains more than its interval is
worth a place in the product; the others are rows of docs/log.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coe.cli.command_line import new_parser, required, run

with required():
    from experiments.data import Data, Source, make_data
    from experiments.plans import Variant
    from experiments.scales import SCALES, Scale

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from experiments.designs import Design
    from experiments.run_results import ResultsFile, RunResult
    from megatron_coe.config.run_config import Settings

MODEL = Variant("moe_8-64_outer", "")
"""What the designs do not decide is this preset's."""


def main() -> int:
    """Screen the designs that the command line names; return an exit status."""
    return run(lambda: command(parse()), "interrupted; the runs that ended are kept")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--designs", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 1, 2, … (default 3)")
    parser.add_argument("--lr", type=float, help="default: that of the scale")
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
    from experiments.run_results import ResultsFile, settings_digest

    names = options.designs or list(DESIGNS)
    for name in names:
        if name not in DESIGNS:
            raise ValueError(f"--designs {name}: there are {', '.join(DESIGNS)}")
    scale, results = SCALES[options.scale], ResultsFile(options.results)
    source = Source(scale.vocab_size)
    data = Data.at(options.output / source.name / "data")
    finished = results.read()
    if not options.report:
        make_data(source, options.output / source.name / "data")
    for seed in range(1, options.seeds + 1):
        for name in names:
            settings = settings_of(scale, seed, data, options)
            key = (name, settings.train.lr, seed, "report")
            digest = settings_digest(settings, ["screen", source.described()])
            if key in finished and finished[key].settings != digest:
                raise ValueError(f"{options.results}: {name}, seed {seed}, is of other settings")
            if key not in finished and not options.report:
                result = train(DESIGNS[name], settings, digest)
                results.append(result)
                print(f"{name}, seed {seed}: {result.loss:.4f}, {result.seconds:.0f} s", flush=True)
    print("\n" + table(results, names, options.seeds))


def settings_of(scale: Scale, seed: int, data: Data, options: argparse.Namespace) -> Settings:
    """Return the settings of a run: those of `fair`."""
    rate = [f"train.lr={options.lr:g}", f"train.min_lr={options.lr / 10:g}"] if options.lr else []
    run_folder = options.output / "screen"
    overrides = ["train.eval_samples=512", *rate, *options.overrides]
    settings = scale.settings_of(MODEL, seed, run_folder, data, overrides)
    settings.data.valid = [str(data.report)]
    return settings


def train(design: Design, settings: Settings, digest: str) -> RunResult:
    """Train a design, and return its result."""
    import torch

    from experiments.designs import build_model, layers_of
    from experiments.run_results import RunResult
    from megatron_coe.conversion.hf_config import to_hf_config
    from megatron_coe.conversion.stored_model import provider_of
    from megatron_coe.hf import CoeConfig
    from megatron_coe.utils.environment import commit

    torch.set_num_threads(1)
    torch.manual_seed(settings.train.seed)
    model = build_model(CoeConfig(**to_hf_config(provider_of(settings))), design)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=(settings.train.adam_beta1, settings.train.adam_beta2),
        eps=settings.train.adam_eps,
        weight_decay=settings.train.weight_decay,
    )
    training, held_out = datasets(settings)
    coefficient = settings.model["moe_aux_loss_coeff"]
    passes, began_s = 0.0, time.perf_counter()
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
        if step > settings.train.steps - 20:
            passes += sum(layer.passes for layer in layers_of(model)) / len(layers_of(model)) / 20
    seconds = time.perf_counter() - began_s
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for tokens, labels, mask in batches_of(held_out, settings.train.global_batch_size):
            total += cross_entropy(model, tokens, labels, mask).sum().item()
            count += mask.sum().item()
    losses = ((settings.train.steps, round(total / count, 6)),)
    key = (design.name, settings.train.lr, settings.train.seed, "report")
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
    from megatron_coe.config.run_config import warmup_steps

    train, warmup = settings.train, warmup_steps(settings.train)
    if step <= warmup:
        return train.lr * step / warmup
    if train.lr_decay_style == "constant":
        return train.lr
    done = (step - warmup) / (train.steps - warmup)
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * done)) / 2


def table(results: ResultsFile, names: list[str], seeds: int) -> str:
    """Render each design's losses and differences to the standard MoE as Markdown."""
    import statistics

    from experiments.designs import DESIGNS
    from megatron_coe.analysis.intervals import Interval
    from megatron_coe.utils.tables import markdown_table

    found: dict[str, dict[int, RunResult]] = {}
    for result in results.read().values():
        if result.seed <= seeds:
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


if __name__ == "__main__":
    raise SystemExit(main())
