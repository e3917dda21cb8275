"""What a checkpoint carries besides its state, so that it is complete wherever it lies.

    <step>/tokenizer.model   the SentencePiece model that its data were made with, or
    <step>/tokenizer/…       the files of the Hugging Face tokenizer
    <step>/documents.json    how the documents begin that it was trained on: `{"prepend_bos": true}`
    <step>/hf/…              what Megatron has no field for in an imported model: `config.json`,
                             `generation_config.json`

Every checkpoint has copies of its own: hard links would be cheaper, but one damaged file would then
damage all checkpoints. A checkpoint of an earlier version has neither; `hf` may lie beside it.
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
    """Return where the rest of an imported model is, if the checkpoint comes from one."""
    own = step / HF_FOLDER
    return own if own.is_dir() else step.parent / HF_FOLDER


def tokenizer_content(path: Path) -> dict[str, bytes]:
    """Read all files of a SentencePiece model or Hugging Face folder: content by its name in a
    checkpoint."""
    if path.is_file():
        return {TOKENIZER_MODEL: path.read_bytes()}
    return {
        f"{TOKENIZER_FOLDER}/{file.relative_to(path).as_posix()}": file.read_bytes()
        for file in tokenizer_files(path)
    }


def documents_content(prepend_bos: bool) -> dict[str, bytes]:
    """Return what says whether documents begin with the tokenizer's token: content by its name."""
    return {DOCUMENTS_FILE: json.dumps({"prepend_bos": prepend_bos}).encode()}


def prepends_bos(step: Path) -> bool | None:
    """Return whether a checkpoint was trained on documents that begin with the tokenizer's token.

    One of an earlier version does not say: `preprocess_data.py` had no such option. None: it was
    not trained here.
    """
    try:
        return bool(json.loads((step / DOCUMENTS_FILE).read_bytes())["prepend_bos"])
    except FileNotFoundError:
        return False if step_of(step) else None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{step / DOCUMENTS_FILE}: does not say prepend_bos ({error})") from error


def hf_content(step: Path) -> dict[str, bytes]:
    """Read what a checkpoint keeps of an imported model: content by its name in a checkpoint."""
    folder = hf_folder(step)
    return {
        f"{HF_FOLDER}/{path.name}": path.read_bytes()
        for path in sorted(folder.glob("*"))
        if path.is_file()
    }


def write_content(step: Path, content: Mapping[str, bytes]) -> dict[str, FileDigest]:
    """Write files under a checkpoint's folder, durably. Raises: OSError."""
    digests = {}
    for name, data in content.items():
        path = step / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digests[name] = write_fsynced(path, data)
    for folder in {(step / name).parent for name in content} - {step}:
        fsync(folder)
    return digests
