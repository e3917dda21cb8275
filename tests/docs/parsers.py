"""Reads command lines with the parsers of the programs they call, and checks the settings in them.

    python -m tests.docs.parsers ROOT < list.json

takes [[program, argument, …], …] and prints a list with a complaint, or null, for each. A program
is run as far as its parser, in this process, which is of no use for anything else afterwards.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path

from megatron_coe.cli import main as coe
from megatron_coe.config.presets import find_settings

ANY_FILE = "examples/quickstart.yaml"
"""Whose place a settings file takes that only the reader has."""


class ParsedError(BaseException):
    """Ends a program as soon as it knows its arguments."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


class RefusedError(BaseException):
    """A parser's complaint."""


def main() -> None:
    root = Path(sys.argv[1])
    asked = json.loads(sys.stdin.read())
    stop_after_parsing()
    print(json.dumps([complaint(root, program, arguments) for program, *arguments in asked]))


def stop_after_parsing() -> None:
    def refuse(parser: argparse.ArgumentParser, message: str) -> None:
        raise RefusedError(message)

    def stopping(parse):
        def parse_and_stop(parser, args=None, namespace=None):
            raise ParsedError(parse(parser, args, namespace))

        return parse_and_stop

    argparse.ArgumentParser.error = refuse
    for name in ("parse_args", "parse_intermixed_args"):
        setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))


def complaint(root: Path, program: str, arguments: list[str]) -> str | None:
    """What is wrong with the arguments, in a few words."""
    try:
        options = parsed(root, program, arguments)
        if options is None:
            return f"{program} takes no arguments" if arguments else None
        ranks = 1
        if program == "torchrun":
            nodes = int(str(options.nnodes).rpartition(":")[2])
            ranks = nodes * int(options.nproc_per_node)
            options = parsed(root, options.training_script, options.training_script_args)
        check_settings(root, options, ranks)
    except (RefusedError, ValueError, OSError) as error:
        return str(error)
    return None


def parsed(root: Path, program: str, arguments: list[str]) -> argparse.Namespace | None:
    """The arguments as the program's parser takes them; None for a program without one.

    Raises RefusedError where they are refused.
    """
    sys.argv = [program, *arguments]
    try:
        if program == "torchrun":
            from torch.distributed.run import parse_args

            parse_args(arguments)
        elif program == "coe":
            coe.main()
        else:
            path = root / program
            text = path.read_text(encoding="utf-8")
            if not re.search(r"argparse|import main$", text, flags=re.MULTILINE):
                return None
            runpy.run_path(str(path), run_name="__main__")
    except ParsedError as end:
        return end.options
    except SystemExit as end:
        if end.code == 0:  # it was asked to print something
            return argparse.Namespace()
        raise ValueError(f"{program} ended with {end.code} before it had read them") from end
    raise ValueError(f"{program} never read its arguments")


def check_settings(root: Path, options: argparse.Namespace, ranks: int) -> None:
    """Raise ValueError where settings that are named, or overridden, cannot be."""
    configs = getattr(options, "configs", [])
    named = [find_settings(text) for text in configs if "=" not in text]
    named = named or [getattr(options, "config", None)]
    files = [path for path in map(root.joinpath, filter(None, named)) if path.exists()]
    placeholders = len(files) < len([path for path in named if path])
    overrides = [*getattr(options, "overrides", []), *(text for text in configs if "=" in text)]
    overrides += [f"{key}={value}" for key, value in varied(getattr(options, "vary", []))]
    if not (files or overrides):
        return
    import torch

    from megatron_coe.config import validation
    from megatron_coe.config.loader import load_settings
    from megatron_coe.config.model_section import build_provider

    for file in files or [root / ANY_FILE]:
        settings = load_settings(file, overrides)
        validation.check_values(settings)
        if files and not placeholders and not hasattr(options, "gpus"):
            fewest = validation.smallest_world_size(settings.parallel)
            validation.check_layout(settings, max(ranks, fewest))
        build_provider(settings, torch.device("cpu"), None)


def varied(options: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Each value of a `--vary section.key=A,B`."""
    for option in options:
        key, _, values = option.partition("=")
        for value in values.split(","):
            yield key, re.sub("^on$", "true", re.sub("^off$", "false", value))


if __name__ == "__main__":
    main()
