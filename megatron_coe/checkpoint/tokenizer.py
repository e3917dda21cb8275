"""The tokenizer of a checkpoint: where it is, and whether another one gives the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_coe.checkpoint.safe_unpickle import read_common
from megatron_coe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_coe.utils.run_files import own_tokenizer

Identity = dict[str, Any]


def find_tokenizer(step: Path, configured: str, named: Path | None = None) -> Path | None:
    """Return the path of a checkpoint's tokenizer, for `load_tokenizer`; None if it has none.

    It is the copy in the checkpoint. Checkpoints of earlier versions have no copy: then it is the
    one that is named, or else the one in the checkpoint's settings.

    Args:
        configured: `data.tokenizer` of the checkpoint's settings.
        named: on the command line; if the checkpoint has a copy, it must give the same ids.

    Raises: ValueError if it does not exist, or gives other ids than those that were trained.
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
    """Return what a checkpoint's state records of a tokenizer: size and content, not its path."""
    return {"vocab_size": tokenizer.vocab_size, **tokenizer.unique_identifiers}


def tokenizer_difference(step: Path, tokenizer: Tokenizer) -> tuple[Identity, Identity] | None:
    """Return the identities of a checkpoint's tokenizer and another, if they give different ids.

    A SentencePiece model and the Hugging Face tokenizer made from it differ in their files only.

    Returns: both identities; None if the ids are the same, or nothing is recorded.
    """
    own, now = own_tokenizer(step), identity_of(tokenizer)
    before = read_common(step).get("tokenizer")
    if before == now:
        return None
    if own is not None:
        copy = load_tokenizer(own)
        before = identity_of(copy)
        is_rebuilt = before["kind"] != now["kind"]
        if before == now or (is_rebuilt and copy.vocabulary() == tokenizer.vocabulary()):
            return None
    return None if before is None else (before, now)


def describe_identity(identity: Identity) -> str:
    """Describe a tokenizer's identity in an error."""
    return f"{identity.get('vocab_size')} ids, SHA-256 {str(identity.get('sha256'))[:12]}…"
