"""Arguments, errors and exit statuses that the commands share."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_coe.config.presets import find_settings
from megatron_coe.data.records import Fields
from megatron_coe.megatron_compat.transformer_engine import broken_by
from megatron_coe.utils.imports import missing_package, quiet_imports

USER_ERROR = 2
INTERRUPTED = 130


def new_parser(
    description: str | None, prog: str | None = None, *, add_help: bool = True
) -> argparse.ArgumentParser:
    """Return a parser whose help begins with a module's docstring, its lines as they are."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=add_help,
    )


def add_renamed(parser: argparse.ArgumentParser, name: str, *former: str, **options: Any) -> None:
    """Add an option that is read under its former names too, which help and errors leave out."""
    parser.add_argument(name, *former, **options).option_strings = [name]


def add_text_arguments(
    parser: argparse.ArgumentParser, source: argparse._MutuallyExclusiveGroup | None = None
) -> None:
    """Add the options for the sources of texts; `fields_of` reads them.

    Args:
        source: `--input` is one of these; None: it must be given.
    """
    (source or parser).add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=source is None,
        metavar="FILE",
        help=".jsonl or .json with one object per line, .txt with one text per line (these also "
        "as .gz or .zst), .parquet",
    )
    add_key_arguments(parser)


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the keys of texts in a record; `fields_of` reads them."""
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--json-keys",
        nargs="+",
        metavar="KEY",
        help="keys (or columns) that hold text, a.b for key b of the object under a; each is a "
        "text by itself (default: text)",
    )
    keys.add_argument(
        "--qa-keys",
        nargs=2,
        metavar=("QUERY", "RESPONSE"),
        help="two keys, joined to one text: query : {QUERY} response : {RESPONSE}",
    )


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say under which keys conversations stand; `fields_of` reads them."""
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--messages-key",
        metavar="KEY",
        help="a key that holds a list of messages (role, content), which the tokenizer's chat "
        "template writes out; the assistant's are targets of the loss",
    )
    keys.add_argument(
        "--prompt-keys",
        nargs=2,
        metavar=("PROMPT", "RESPONSE"),
        help="two keys: a prompt, and the response that is the target of the loss",
    )


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option for the tokenizer of a checkpoint without one (`checkpoints.tokenizer`)."""
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer of a checkpoint that has no copy of its own, as earlier versions wrote it",
    )


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the model of a command whose input is text."""
    add_renamed(parser, "--model", "--load", type=Path, required=True, metavar="FOLDER")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names the settings of a run: file or preset, and overrides."""
    parser.add_argument(
        "--config",
        type=settings_file,
        required=True,
        metavar="FILE|PRESET",
        help="YAML file of the run, or a preset such as paper/coe-2_4-64",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over the file"
    )


def settings_file(text: str) -> Path:
    """Find the file of settings that an option names, for argparse."""
    try:
        return find_settings(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def fields_of(options: argparse.Namespace) -> Fields:
    """Return the keys that the options name. Raises: ValueError for keys that cannot be."""
    of_texts = options.json_keys or options.qa_keys
    messages, prompts = (
        getattr(options, "messages_key", None),
        getattr(options, "prompt_keys", None),
    )
    if keys := [messages] if messages else prompts:
        if of_texts:
            raise ValueError(
                "--json-keys and --qa-keys name texts, --messages-key and --prompt-keys "
                "conversations: give one of them"
            )
        from megatron_coe.data.chat import ChatFields  # imports tokenizers, which others do without

        return ChatFields(tuple(keys))
    if options.qa_keys:
        return Fields(tuple(options.qa_keys), question_answer=True)
    return Fields(tuple(options.json_keys or ["text"]))


def run(main: Callable[[], None], interrupted: str = "interrupted; nothing was written") -> int:
    """Call `main` and return the exit status: 2 after the user's or the disk's error, in one line.

    Args:
        interrupted: the message after Ctrl-C or SIGTERM.
    """
    signal.signal(signal.SIGTERM, _terminate)
    quiet_imports()
    try:
        main()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        reported = broken_by(error) or missing_package(error) or error
        if not isinstance(reported, ValueError | OSError):
            raise
        print(f"error: {reported}", file=sys.stderr)
        return USER_ERROR
    return 0


@contextmanager
def required() -> Iterator[None]:
    """Wrap imports without which a command cannot even read its options."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (reported := missing_package(error)) is None:
            raise
        print(f"error: {reported}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from error


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # as Ctrl-C: temporary files and workers are removed
