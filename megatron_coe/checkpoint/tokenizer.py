"""The tokenizer of a checkpoint: where it is, and whether another one is as good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_coe.checkpoint.safe_unpickle import read_common
from megatron_coe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_coe.utils.run_files import own_tokenizer

Identity = dict[str, Any]


def find_tokenizer(step: Path, configured: str, named: Path | None = None) -> Path | None:
    """Return where a checkpoint's tokenizer is, for `load_tokenizer`; None if it knows of none.

    It is the copy in the checkpoint. One of an earlier version has no copy: then it is the one that
    is named, or else the one that the checkpoint's settings name.

    Args:
        configured: `data.tokenizer` of the checkpoint's settings.
        named: on the command line; of a checkpoint with a copy it may only be the same.

    Raises: ValueError if it is not there, or gives other ids than those that were trained.
    """
    own = own_tokenizer(step)
    path = named or own or Path(configured)
    if path == Path():
        return None
    if not path.exists():
        raise ValueError(
            f"tokenizer {path} does not exist"
            if named
            else f"checkpoint {step} holds no copy of its tokenizer, and its data.tokenizer={path} "
            "does not exist here: name it with --tokenizer"
        )
    if path != own and (difference := tokenizer_difference(step, load_tokenizer(path))):
        before, now = map(describe_identity, difference)
        raise ValueError(
            f"tokenizer {path} ({now}) is not the one that checkpoint {step} was trained with "
            f"({before}): "
            + ("leave it out, the checkpoint has its own" if own else "name it with --tokenizer")
        )
    return own or path


def identity_of(tokenizer: Tokenizer) -> Identity:
    """Return what a checkpoint's state keeps of a tokenizer: its size and content, not its path."""
    return {"vocab_size": tokenizer.vocab_size, **tokenizer.unique_identifiers}


def tokenizer_difference(step: Path, tokenizer: Tokenizer) -> tuple[Identity, Identity] | None:
    """Return the identities of a checkpoint's tokenizer and another, if ids mean something else.

    A SentencePiece model and the Hugging Face tokenizer made of it are two files with the same ids.
    """
    own, now = own_tokenizer(step), identity_of(tokenizer)
    before = read_common(step).get("tokenizer")
    if before == now or (before is None and own is None):
        return None
    if own is not None:
        copy = load_tokenizer(own)
        before = identity_of(copy)
        is_rebuilt = before["kind"] != now["kind"]
        if before == now or (is_rebuilt and copy.vocabulary() == tokenizer.vocabulary()):
            return None
    return before, now


def describe_identity(identity: Identity) -> str:
    return f"{identity.get('vocab_size')} ids, SHA-256 {str(identity.get('sha256'))[:12]}…"
