"""Parameters, work per token and memory of the model of a configuration; nothing is built.

coe estimate --config examples/paper/coe-2_4-64.yaml [section.key=value …]

The vocabulary is model.vocab_size or, as in training, that of the tokenizer at data.tokenizer.
"""

from __future__ import annotations

import argparse

from megatron_coe.cli.command_line import (
    add_config_arguments,
    new_parser,
    required,
    run,
)
from megatron_coe.utils.imports import collected_later

with required():
    from megatron_coe.config.loader import load_settings
    from megatron_coe.config.validation import check_layout, check_values, smallest_world_size


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)))


def command(options: argparse.Namespace) -> None:
    settings = load_settings(options.config, options.overrides)
    check_values(settings)
    world_size = options.world_size
    if world_size is None:
        world_size = smallest_world_size(settings.parallel)
    if world_size < 1:
        raise ValueError(f"--world-size={world_size}: give 1 or more")
    check_layout(settings, world_size)
    with collected_later():  # only now, because they take seconds
        import torch

        from megatron_coe.config.model_section import build_provider
        from megatron_coe.planning.run_summary import describe_sizes, plan_of, tokenizer_vocab_size

    device = torch.device(options.device)
    provider = build_provider(settings, device, tokenizer_vocab_size(settings.data.tokenizer))
    on_gpu = options.device == "cuda"
    print(describe_sizes(plan_of(provider, settings.parallel, settings.train, world_size, on_gpu)))


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    add_config_arguments(parser)
    parser.add_argument(
        "--world-size", type=int, help="processes; by default the fewest that hold the layout"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="decides train.precision=auto"
    )
    return parser.parse_intermixed_args(arguments)
