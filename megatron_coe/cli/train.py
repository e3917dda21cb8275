"""Train a Chain-of-Experts model.

    coe train --config quickstart train.steps=100
    torchrun --nproc-per-node 8 pretrain_coe.py --config paper/coe-2_4-64
    coe train --help model.moe          every setting whose name holds these letters
    coe train --json-schema > coe.json  the settings for an editor that completes and checks YAML

Run again, the same command resumes from its latest checkpoint. SIGTERM, SIGINT (Ctrl-C) and SIGUSR1
end it before the next step, saved; a second Ctrl-C ends it at once.

Exit status: 0 done; 2 an error in settings, data or checkpoint, in one line (also: there are
checkpoints, and none is valid); 65 loss or gradients were not finite, nothing was updated; 70 a
rank hung, died or failed, and is named; 74 a checkpoint could not be written, earlier ones are
intact; 75 ended by a signal, resumed by the same command; 128 + number of the signal (130 for
Ctrl-C) that ended it without a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_coe.cli.command_line import USER_ERROR, add_config_arguments, new_parser
from megatron_coe.training.pretrain import Request, pretrain
from megatron_coe.utils.imports import quiet_imports, quiet_megatron

NAME = "pretrain_coe.py"


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    options = parse(arguments, prog)
    return pretrain(
        Request(
            options.config,
            options.overrides,
            dry_run=options.dry_run,
            eval_only=options.eval_only,
            name=prog or NAME,
            is_process=arguments is None or prog is not None,
        )
    )


class _Show(argparse.Action):
    """An option that prints something and ends the command, whatever else is given."""

    def __init__(self, *args: Any, show: Callable[[Any], str], **options: Any) -> None:
        options["default"] = argparse.SUPPRESS
        super().__init__(*args, **options)
        self.show = show

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        quiet_imports()
        quiet_megatron()
        try:
            print(self.show(values))
        except ValueError as error:
            parser.exit(USER_ERROR, f"error: {error}\n")
        parser.exit()


def _described(text: str) -> str:
    from megatron_coe.config.settings_table import describe_settings

    return describe_settings(text)


def _schema() -> str:
    from megatron_coe.config.settings_table import json_schema

    return json.dumps(json_schema(), indent=1)


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog, add_help=False)
    add_config_arguments(parser)
    parser.add_argument(
        "-h",
        "--help",
        nargs="?",
        const="",
        action=_Show,
        show=lambda text: _described(text) if text else parser.format_help().rstrip(),
        metavar="SETTING",
        help="this page, or the settings whose name or description holds some text",
    )
    parser.add_argument(
        "--json-schema",
        nargs=0,
        action=_Show,
        show=lambda _: _schema(),
        help="print the JSON Schema of a file of settings",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--dry-run", action="store_true", help="print settings, sizes and data, and stop"
    )
    mode.add_argument(
        "--eval-only", action="store_true", help="validate the latest checkpoint, and stop"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
