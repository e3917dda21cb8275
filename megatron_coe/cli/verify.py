"""Verify checkpoints without loading them: each file's digest, and that nothing is executed.

    coe verify --input runs/quickstart/checkpoints
    coe verify --input runs/old/checkpoints/step_00001000 --write-manifest

The second writes the manifest of a checkpoint that has none, because an earlier version wrote it or
`checkpoint.verify=false` did: whoever runs it vouches for the content.

Exit status: 0 all are good, 2 one is not (each is named), or there is none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_coe.cli.command_line import add_renamed, new_parser, run
from megatron_coe.utils.imports import collected_later, quiet_megatron


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)))


def command(options: argparse.Namespace) -> None:
    quiet_megatron()
    with collected_later():  # these import Megatron, which takes seconds
        from megatron_coe.checkpoint.directory import find_checkpoints
        from megatron_coe.checkpoint.errors import BadCheckpointError
        from megatron_coe.checkpoint.manifest import add_manifest
        from megatron_coe.checkpoint.verify import unlisted_files, verify_checkpoint
        from megatron_coe.utils.run_files import FORMAT_FILE

    folder: Path = options.input
    found = [folder] if (folder / FORMAT_FILE).is_file() else find_checkpoints(folder)
    if not found:
        raise ValueError(f"{folder}: neither a checkpoint nor a folder of checkpoints")
    bad = 0
    for path in found:
        try:
            if options.write_manifest:
                add_manifest(path, verify_checkpoint(path, verify=False)["progress"]["step"])
            step = verify_checkpoint(path)["progress"]["step"]
            print(f"{path}: good, step {step}")
            if warning := unlisted_files(path):
                print(warning, file=sys.stderr)
        except BadCheckpointError as error:
            bad += 1
            print(f"{path}: {error.verdict}: {error}")
    if bad:
        raise ValueError(f"{bad} of {len(found)} checkpoint(s) in {folder} are bad")


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    add_renamed(
        parser,
        "--input",
        "--load",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a checkpoint step_…, or the folder of several",
    )
    parser.add_argument(
        "--write-manifest",
        action="store_true",
        help="write the manifest of a checkpoint that has none",
    )
    return parser.parse_args(arguments)
