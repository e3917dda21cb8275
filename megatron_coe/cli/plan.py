"""The layouts that a model and a number of GPUs allow, ranked by the estimated time of a step.

coe plan --config examples/scale/lite_coe-2_3-65.yaml --gpus 512 [--gpu h200]

Nothing is trained and no GPU is needed. The last lines are YAML for the fastest layout that fits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coe.cli.command_line import (
    add_config_arguments,
    new_parser,
    required,
    run,
)
from megatron_coe.utils.imports import collected_later

with required():
    from megatron_coe.config.loader import load_settings
    from megatron_coe.config.run_config import Settings
    from megatron_coe.config.schedules import batch_schedule
    from megatron_coe.config.validation import check_layout, check_values
    from megatron_coe.planning.hardware import GPUS, Cluster

if TYPE_CHECKING:
    from megatron_coe.planning.build import Built
    from megatron_coe.planning.plan import Plan

MOST_GPUS = 1 << 20


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)))


def command(options: argparse.Namespace) -> None:
    cluster = Cluster(GPUS[options.gpu], options.gpus_per_node)
    settings = load_settings(options.config, options.overrides)
    check_values(settings)
    check_options(options, settings)
    with collected_later():  # only now, because they take seconds
        import torch

        from megatron_coe.config.model_section import build_provider
        from megatron_coe.model.backends import prepare
        from megatron_coe.planning import layout_search, report
        from megatron_coe.planning.run_summary import plan_of, tokenizer_vocab_size

    prepare()
    model = build_provider(
        settings, torch.device("cuda"), tokenizer_vocab_size(settings.data.tokenizer)
    )
    if options.keep_layout:
        plan = plan_of(model, settings.parallel, settings.train, options.gpus, on_gpu=True)
        ranking = layout_search.Ranking([layout_search.estimate(plan, cluster)], legal=1)
    else:
        ranking = layout_search.rank_layouts(
            model, options.gpus, batch_schedule(settings.train), cluster
        )
        if not ranking.fitting:
            raise ValueError(report.nothing_fits(ranking, cluster))
    best = ranking.fitting[0]
    built = build(best.plan, options.rank) if options.build else []
    if options.json:
        shown = [report.as_dict(found, cluster) for found in ranking.fitting[: options.top]]
        checked = [{**vars(one), "agrees": one.agrees} for one in built]
        print(json.dumps({"legal": ranking.legal, "layouts": shown, "built": checked}, indent=1))
    else:
        print(report.headline(best.plan, cluster))
        print(report.ranking_table(ranking, cluster, options.top), end="\n\n")
        print(report.details(best, cluster), end="\n\n")
        if built:
            print(report.built_table(built), end="\n\n")
        print(report.as_yaml(best))
    if not all(one.agrees for one in built):
        raise ValueError("the built model is not the predicted one: please report this layout")


def build(plan: Plan, rank: int | None) -> list[Built]:
    """Build the rank asked for, or one each of the first, the fullest and the last stage."""
    from megatron_coe.planning.build import build_rank
    from megatron_coe.planning.memory import peak_memory_stage

    stages = plan.model.pipeline_model_parallel_size
    each = plan.world_size // stages
    firsts = sorted({0, peak_memory_stage(plan) * each, (stages - 1) * each})
    return [build_rank(plan, number) for number in ([rank] if rank is not None else firsts)]


def check_options(options: argparse.Namespace, settings: Settings) -> None:
    """Raise ValueError for what cannot be planned."""
    gpus, per_node = options.gpus, options.gpus_per_node
    for name in ("gpus", "gpus_per_node", "top"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(options, name)}: give 1 or more")
    if gpus > MOST_GPUS:
        raise ValueError(f"--gpus={gpus}: layouts are listed for at most {MOST_GPUS:,}")
    if gpus > per_node and gpus % per_node:
        raise ValueError(
            f"--gpus={gpus} is no multiple of --gpus-per-node={per_node}: give whole nodes"
        )
    if options.rank is not None and not (options.build and 0 <= options.rank < gpus):
        raise ValueError(f"--rank={options.rank}: goes with --build, and is one of 0 … {gpus - 1}")
    tokenizer = settings.data.tokenizer
    if not settings.model.get("vocab_size") and not (tokenizer and Path(tokenizer).exists()):
        raise ValueError(
            "model.vocab_size is not set, and no tokenizer is there whose ids could be counted "
            f"(data.tokenizer={tokenizer}): give model.vocab_size=…; the tables and the output "
            "head are a large part of the cost"
        )
    if options.keep_layout:
        check_layout(settings, gpus)


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, required=True, help="how many in all")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--top", type=int, default=10, help="how many layouts to print")
    parser.add_argument(
        "--keep-layout", action="store_true", help="the cost of the file's own layout; no search"
    )
    parser.add_argument(
        "--build", action="store_true", help="build ranks of the layout on the meta device as well"
    )
    parser.add_argument("--rank", type=int, help="the one to build (default: of three stages)")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    return parser.parse_intermixed_args(arguments)
