"""The files of a checkpoint beside its state, which make it usable anywhere.

    <step>/tokenizer.model   the SentencePiece model that its data were made with, or
    <step>/tokenizer/…       the files of the Hugging Face tokenizer
    <step>/documents.json    whether the training documents begin with BOS: `{"prepend_bos": true}`
    <step>/hf/…              the `config.json` and `generation_config.json` of an imported model,
                             for the fields that Megatron does not have

Every checkpoint has its own copies: with hard links, one damaged file would damage all checkpoints.
Checkpoints of earlier versions have neither; `hf` may lie beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_coe.data.tokenizer import tokenizer_files
from megatron_coe.utils.fsynced import FileDigest, fsync, write_fsynced
from megatron_coe.utils.run_files import (
    DOCUMENTS_FILE,
    HF_FOLDER,
    TOKENIZER_FOLDER,
    TOKENIZER_MODEL,
    step_of,
)


def hf_folder(step: Path) -> Path:
    """Return where the Hugging Face files of an imported model are, if it is one."""
    own = step / HF_FOLDER
    return own if own.is_dir() else step.parent / HF_FOLDER


def tokenizer_content(path: Path) -> dict[str, bytes]:
    """Read a SentencePiece model or a Hugging Face tokenizer's files, to be put into checkpoints.

    Returns: content by file name in a checkpoint.
    """
    if path.is_file():
        return {TOKENIZER_MODEL: path.read_bytes()}
    return {
        f"{TOKENIZER_FOLDER}/{file.relative_to(path).as_posix()}": file.read_bytes()
        for file in tokenizer_files(path)
    }


def documents_content(prepend_bos: bool) -> dict[str, bytes]:
    """Return `documents.json`, which records whether documents begin with BOS, by file name."""
    return {DOCUMENTS_FILE: json.dumps({"prepend_bos": prepend_bos}).encode()}


def prepends_bos(step: Path) -> bool | None:
    """Return whether a checkpoint was trained on documents that begin with BOS.

    Earlier versions, which did not record it, had no such option: False. None: it was not trained
    here.

    Raises: ValueError naming a `documents.json` that is damaged.
    """
    try:
        return bool(json.loads((step / DOCUMENTS_FILE).read_bytes())["prepend_bos"])
    except FileNotFoundError:
        return False if step_of(step) else None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{step / DOCUMENTS_FILE}: does not say prepend_bos ({error})") from error


def hf_content(step: Path) -> dict[str, bytes]:
    """Read the Hugging Face files that a checkpoint keeps: content by file name in a checkpoint."""
    folder = hf_folder(step)
    return {
        f"{HF_FOLDER}/{path.name}": path.read_bytes()
        for path in sorted(folder.glob("*"))
        if path.is_file()
    }


def write_content(step: Path, content: Mapping[str, bytes]) -> dict[str, FileDigest]:
    """Write files into a checkpoint's folder, fsynced. Raises: OSError."""
    digests = {}
    for name, data in content.items():
        path = step / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digests[name] = write_fsynced(path, data)
    for folder in {(step / name).parent for name in content} - {step}:
        fsync(folder)
    return digests
