"""Verify checkpoints without loading them: each file's SHA-256, and that nothing is executed.

    python tools/verify_checkpoint.py --load runs/quickstart/checkpoints
    python tools/verify_checkpoint.py --load runs/old/checkpoints/step_00001000 --write-manifest

The second writes the manifest of a checkpoint that has none, because an earlier version wrote it or
`checkpoint.verify=false` did: whoever runs it vouches for the content.

Exit status: 0 all are good, 2 one is not (each is named), or there is none.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron_coe.cli.command_line import run


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    warnings.filterwarnings("ignore", module="megatron.*")
    # These import Megatron, which takes seconds.
    from megatron_coe.checkpoint.directory import find_checkpoints
    from megatron_coe.checkpoint.errors import BadCheckpointError
    from megatron_coe.checkpoint.manifest import sign
    from megatron_coe.checkpoint.verify import check_checkpoint, strange_files
    from megatron_coe.utils.run_files import FORMAT_FILE

    folder: Path = options.load
    found = [folder] if (folder / FORMAT_FILE).is_file() else find_checkpoints(folder)
    if not found:
        raise ValueError(f"{folder}: neither a checkpoint nor a folder of checkpoints")
    bad = 0
    for path in found:
        try:
            if options.write_manifest:
                sign(path, check_checkpoint(path, verify=False)["progress"]["step"])
            step = check_checkpoint(path)["progress"]["step"]
            print(f"{path}: good, step {step}")
            if strange := strange_files(path):
                print(strange, file=sys.stderr)
        except BadCheckpointError as error:
            bad += 1
            print(f"{path}: {error.verdict}: {error}")
    if bad:
        raise ValueError(f"{bad} of {len(found)} checkpoint(s) in {folder} are bad")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
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


if __name__ == "__main__":
    sys.exit(run(main))
