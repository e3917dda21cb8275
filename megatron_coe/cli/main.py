"""`coe COMMAND`: the commands of this package, a module of `megatron_coe.cli` each."""

from __future__ import annotations

import argparse
import importlib
import sys

from megatron_coe import __version__

COMMANDS = {
    "train": "train, resume or validate a run",
    "preprocess": "tokenize text into Megatron's .bin/.idx files",
    "train-tokenizer": "train a SentencePiece tokenizer",
    "make-corpus": "generate a corpus of math problems",
    "convert": "convert a checkpoint to a Hugging Face folder, or back",
    "upcycle": "start a CoE model from a pretrained MoE",
    "generate": "continue prompts with a model",
    "score": "ask a model held-out questions",
    "serve": "serve a model with vLLM",
    "plan": "rank the layouts of a model on a number of GPUs",
    "estimate": "print parameters, FLOPs and memory of a model",
    "analyze": "measure the routing of a model",
    "report": "write a page about a run",
    "plot": "draw the losses of runs side by side",
    "compare": "train models with several seeds and compare their losses",
    "verify": "verify checkpoints",
}


def main() -> int:
    """Run the command that the command line names; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="coe",
        description="Chain-of-Experts on Megatron-Core.",
        epilog="coe COMMAND --help says more. Several processes: torchrun --nproc-per-node N -m "
        "megatron_coe.cli.train …",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False).set_defaults(command=name)
    options, _ = parser.parse_known_args(sys.argv[1:2])
    module = importlib.import_module(f"megatron_coe.cli.{options.command.replace('-', '_')}")
    return module.main(sys.argv[2:], prog=f"coe {options.command}")


if __name__ == "__main__":
    sys.exit(main())
