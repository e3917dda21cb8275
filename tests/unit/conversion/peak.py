"""Runs tools/convert_checkpoint.py and prints by how many bytes this process grew at most.

python -m tests.unit.conversion.peak SMALL_MODEL to-hf|from-hf OPTION …
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import torch

from megatron_coe.cli.convert import command, parse


def convert(arguments: list[str]) -> None:
    command(parse(arguments, None))


def resident(field: str) -> int:
    """Bytes of `VmRSS`, what the process holds now, or of `VmHWM`, the most it held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def main(small: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # brings in what is imported on first use
        convert(["from-hf", "--input", small, "--output", f"{folder}/checkpoint"])
        convert(["to-hf", "--input", f"{folder}/checkpoint", "--output", f"{folder}/hf"])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = resident("VmRSS")
    convert(list(arguments))
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
