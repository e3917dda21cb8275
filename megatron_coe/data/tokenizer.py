"""One small interface over SentencePiece models and Hugging Face tokenizer folders.

Megatron's own wrappers (`megatron.core.tokenizers`) are not used: importing them takes about 4 s
and 360 MB in every preprocessing worker, their SentencePiece and Hugging Face classes have no
`eod`, which `GPTDataset` reads, and they identify a tokenizer by its path alone. The classes here
have what `GPTDatasetConfig(tokenizer=…)` uses.
"""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece

from megatron_coe.data.records import Fields, check_inputs, read_texts
from megatron_coe.utils.files import atomic_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TOKEN = -1  # no such token, in SentencePiece and Megatron's datasets

# SentencePiece writes its number of threads into the model and sums scores per thread: with a fixed
# number the same texts give the same bytes on any machine, for one version of SentencePiece.
TRAINER_THREADS = 4
SPECIAL_IDS: dict[str, Any] = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}


class Tokenizer(ABC):
    """Interface of tokenizers: text to token ids and back.

    Attributes:
        path: file or folder it was loaded from.
        vocab_size: ids are in [0, vocab_size).
        eod: id of the end-of-document token, -1 if there is none.
        bos: id of the beginning-of-sequence token, -1 if there is none.
        pad: id of the padding token, -1 if there is none or it is EOD or BOS (which Megatron would
            mask out of the loss).
        unique_identifiers: what Megatron names index caches after; independent of the path.
    """

    def __init__(
        self, path: Path, *, vocab_size: int, eod: int, bos: int, pad: int, digest: str
    ) -> None:
        self.path = path
        self.vocab_size = vocab_size
        self.eod = eod
        self.bos = bos
        self.pad = NO_TOKEN if pad in (eod, bos) else pad
        self.unique_identifiers = OrderedDict(kind=type(self).__name__, sha256=digest)

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens (the paper's recipe)."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; padding and other control tokens have none."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token."""


class SentencePieceTokenizer(Tokenizer):
    """Tokenizer of a SentencePiece `.model` file."""

    def __init__(self, path: Path) -> None:
        """Load a SentencePiece model. Raises: ValueError when the file is none."""
        model = path.read_bytes()
        if not model:
            raise ValueError(f"tokenizer {path} is not a SentencePiece model (it is empty)")
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            vocab_size = self.processor.get_piece_size()
        except RuntimeError as error:
            raise ValueError(f"tokenizer {path} is not a SentencePiece model") from error
        if vocab_size == 0:
            raise ValueError(f"tokenizer {path} is not a SentencePiece model (it holds no piece)")
        super().__init__(
            path,
            vocab_size=vocab_size,
            eod=self.processor.eos_id(),
            bos=self.processor.bos_id(),
            pad=self.processor.pad_id(),
            digest=hashlib.sha256(model).hexdigest(),
        )

    def tokenize(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(token) for token in ids])

    def vocabulary(self) -> dict[str, int]:
        return {self.processor.id_to_piece(number): number for number in range(self.vocab_size)}


class HuggingFaceTokenizer(Tokenizer):
    """Tokenizer of a Hugging Face folder (extra `hf`), read locally, without running its code."""

    def __init__(self, path: Path) -> None:
        """Load a folder. Raises: ValueError: it holds no tokenizer, or transformers is missing."""
        if not tokenizer_files(path):
            raise ValueError(
                f"tokenizer {path}: the folder holds none of tokenizer.json, tokenizer.model, "
                "vocab.json, vocab.txt or their like"
            )
        try:
            from transformers import AutoTokenizer, PretrainedConfig
        except ModuleNotFoundError as error:
            raise ValueError(
                f"tokenizer {path} is a Hugging Face folder, and the package {error.name} is not "
                "installed: `pip install transformers`"
            ) from error
        try:
            # Reading the configuration of a CoE model would need its code, and is not necessary.
            config = {"config": PretrainedConfig()} if _is_own_model(path) else {}
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False, **config
            )
        except Exception as error:  # whatever parsers raise on damaged files
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"tokenizer {path} cannot be loaded ({reason})") from error
        vocabulary = self._tokenizer.get_vocab()
        super().__init__(
            path,
            vocab_size=max(vocabulary.values()) + 1,
            eod=_id_or_none(self._tokenizer.eos_token_id),
            bos=_id_or_none(self._tokenizer.bos_token_id),
            pad=_id_or_none(self._tokenizer.pad_token_id),
            digest=hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest(),
        )

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of transformers."""
        return self._tokenizer

    def incompatibility(self) -> str | None:
        """Explain why other versions of transformers may read the folder differently, or None."""
        if not self._tokenizer.is_fast:
            return "it has no fast form: exports contain its files as they are, no tokenizer.json"
        models = [] if (self.path / "tokenizer.json").is_file() else self.path.glob("*.model")
        for path in models:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            for text in ("The sum of 12 and 3 is 15.", "naïve café, Привет", "a  b\n"):
                expected = processor.encode(text, out_type=str)
                tokens = self._tokenizer.convert_ids_to_tokens(self.tokenize(text))
                if tokens != expected:
                    return (
                        f"this version of transformers reads {path.name} unlike SentencePiece "
                        f"({text!r} as {tokens}, not {expected}): give the file itself"
                    )
        return None


def load_tokenizer(path: str | Path) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """Load the tokenizer of a SentencePiece model file or a Hugging Face folder.

    Raises: ValueError when there is none at `path`, or it cannot be read.
    """
    if not str(path):
        raise ValueError("no tokenizer: give a SentencePiece .model file or a tokenizer folder")
    path = Path(path)
    if path.is_dir():
        return HuggingFaceTokenizer(path)
    if not path.is_file():
        raise ValueError(f"tokenizer {path} does not exist")
    return SentencePieceTokenizer(path)


_FILE_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "*vocab*.json",
    "vocab.txt",
    "merges*.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "tekken.json",
    "word_pronunciation.json",
    "word_shape.json",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """List all files of the Hugging Face tokenizer in a folder, which may also hold a model.

    `config.json` is among them where `tokenizer_config.json` does not name the tokenizer's class:
    transformers then derives it from the model's.
    """
    found = [path for pattern in _FILE_PATTERNS for path in folder.glob(pattern) if path.is_file()]
    try:
        text = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
        names_class = "tokenizer_class" in json.loads(text)
    except (OSError, ValueError, TypeError, RecursionError):
        names_class = False
    if found and not names_class and (folder / "config.json").is_file():
        found.append(folder / "config.json")
    return sorted(set(found))


def train_tokenizer(
    inputs: Sequence[Path],
    output: Path,
    *,
    fields: Fields,
    vocab_size: int = 4096,
    model_type: str = "bpe",
) -> SentencePieceTokenizer:
    """Train a SentencePiece model on all texts of the input files and write it to `output`.

    Detokenization is lossless: nothing is normalized, and characters outside the vocabulary become
    bytes. The digits 0 to 9 are single tokens, which helps with arithmetic (SentencePiece splits
    full-width ones too, but not those of other scripts).

    Returns: the tokenizer in `output`.

    Raises: ValueError for invalid input, no text, or a vocabulary the texts cannot fill.
    """
    check_inputs(inputs, fields)
    # All at once, because SentencePiece ignores an error raised while it reads. It keeps the texts
    # in memory in any case.
    texts = [text for text in read_texts(inputs, fields) if text.strip()]
    if not texts:
        raise ValueError(f"no text in {', '.join(map(str, inputs))}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 30,  # longer texts would be silently left out
            num_threads=TRAINER_THREADS,
            minloglevel=2,
            **SPECIAL_IDS,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise ValueError(f"vocab_size={vocab_size}, {model_type}: {reason}") from error
    with atomic_path(output) as temporary:
        temporary.write_bytes(model.getvalue())
    return SentencePieceTokenizer(output)


def _id_or_none(token: int | None) -> int:
    return NO_TOKEN if token is None else token


def _is_own_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config.get("model_type") == "coe_deepseekv2"
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
