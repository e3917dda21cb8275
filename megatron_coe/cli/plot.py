"""Draw the losses of runs side by side.

    coe plot runs/quickstart --output loss.png
    coe plot moe=runs/moe_seed-1,runs/moe_seed-2 \\
        coe=runs/coe_seed-1,runs/coe_seed-2 --x flops --output loss.svg

Each RUN is a run's folder or its metrics.jsonl. NAME=RUN,RUN,… is one curve: the mean of runs that
differ by their seeds, in a band of one standard deviation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_coe.cli.command_line import new_parser, required, run

with required():
    from megatron_coe.analysis.loss_curves import LOSSES, Group, describe_end, plot_losses
    from megatron_coe.analysis.plotting import save
    from megatron_coe.analysis.runs import AXES, Run


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)))


def command(options: argparse.Namespace) -> None:
    groups = read_groups(options.runs)
    save(plot_losses(groups, options.x, options.losses, options.title), options.output)
    for group in groups:
        named = f"{group.name}: " if len(groups) > 1 else ""
        print(f"{options.output}: {named}{describe_end(group)}")


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    parser.add_argument("runs", nargs="+", metavar="RUN|NAME=RUN,RUN,…")
    parser.add_argument("--output", type=Path, required=True, help="picture (.png, .svg, .pdf)")
    parser.add_argument("--x", choices=AXES, default="steps", help="default: %(default)s")
    parser.add_argument(
        "--losses",
        choices=LOSSES,
        nargs="+",
        default=[],
        help="default: validation; both of one run",
    )
    parser.add_argument("--title", default="")
    return parser.parse_args(arguments)


def read_groups(texts: list[str]) -> list[Group]:
    """Read the runs of each curve. Raises: ValueError: equal names, broken records; OSError."""
    groups = []
    for text in texts:
        name, equals, paths = text.partition("=")
        runs = tuple(Run.read(Path(path)) for path in (paths.split(",") if equals else [text]))
        groups.append(Group(name if equals else runs[0].name, runs))
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise ValueError(f"two curves go by the same name ({', '.join(names)}): give NAME=RUN")
    return groups
