"""The tokenizer of an exported folder: the token ids of training, in all versions of transformers.

A SentencePiece model is rebuilt as `tokenizer.json`. A Hugging Face folder's files are copied; the
copy gets a `tokenizer.json` written from the tokenizer that training used where transformers would
add other special tokens than training did, or would have to build the tokenizer from its
vocabulary, which its versions do differently.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_coe.conversion.folders import read_json, write_json
from megatron_coe.data.fast_tokenizer import (
    SentencePieceModel,
    fast_tokenizer,
    probe_texts,
    probes,
)
from megatron_coe.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_files,
)

if TYPE_CHECKING:
    import tokenizers

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODEL_INPUTS = ["input_ids", "attention_mask"]  # some tokenizers would add token_type_ids
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_OF_ONE_CLASS = ("tokenizer_class", "auto_map", "add_bos_token", "add_eos_token", "processor_class")
"""Keys of how a tokenizer is built, which `tokenizer.json` already contains."""


@dataclass(frozen=True)
class Usage:
    """The use of the tokenizer in training."""

    max_length: int | None = None
    """Tokens per sequence; None: unknown."""
    prepend_bos: bool | None = None
    """Whether documents begin with BOS; None: unknown, the model was not trained here."""


UNKNOWN = Usage()


def write_tokenizer(source: Path, folder: Path, usage: Usage = UNKNOWN) -> dict[str, int]:
    """Write the tokenizer at `source` (SentencePiece file or Hugging Face folder) into a folder.

    Returns: its special ids, by configuration key (`bos_token_id` and so on).

    Raises: ValueError when a SentencePiece model has no Hugging Face form with the same ids.
    """
    tokenizer = load_tokenizer(source)
    if isinstance(tokenizer, SentencePieceTokenizer):
        _write_sentencepiece(tokenizer, folder, usage)
    else:
        _write_hugging_face(tokenizer, folder, usage)
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eod, "pad": tokenizer.pad}
    return {f"{name}_token_id": number for name, number in ids.items() if number >= 0}


def describe_tokenizer(source: Path, usage: Usage) -> str:
    """Describe a tokenizer in a few words, for a model card."""
    tokenizer = load_tokenizer(source)
    if isinstance(tokenizer, SentencePieceTokenizer):
        specification = SentencePieceModel(tokenizer.processor).proto.trainer_spec
        kind = f"SentencePiece, {specification.ModelType.Name(specification.model_type).lower()}"
    else:
        kind = f"Hugging Face, {type(tokenizer.tokenizer).__name__}"
    suffix = ", documents begin with BOS" if usage.prepend_bos else ""
    return f"{kind}, {tokenizer.vocab_size:,} ids{suffix}"


def check_tokenizer(source: Path, folder: Path, usage: Usage) -> None:
    """Compare an exported folder's tokenizer, as transformers loads it, with that of training.

    Raises: ValueError naming a text with other ids.
    """
    trained, exported = load_tokenizer(source), HuggingFaceTokenizer(folder)
    options: dict[str, bool] = {}
    if isinstance(trained, SentencePieceTokenizer):
        model = SentencePieceModel(trained.processor)
        special = {piece: number for number, piece in enumerate(model.pieces)}
        special = {piece: special[piece] for piece in model.control}
        known, texts = fast_tokenizer(model), list(probes(model))
        known.tokenizer.encode_special_tokens = True
        encodings = known.tokenizer.encode_batch(texts, add_special_tokens=False)
        expected = [encoding.ids for encoding in encodings]
        options["split_special_tokens"] = True  # SentencePiece reads their names as text
    else:
        special = _special_ids(trained)
        texts = list(_probe_texts(trained))
        expected = [trained.tokenize(text) for text in texts]
    encoded = exported.tokenizer(texts, add_special_tokens=False, verbose=False, **options)
    found = list(zip(texts, expected, encoded["input_ids"], strict=True))
    found += [(piece, [number], exported.tokenize(piece)) for piece, number in special.items()]
    if usage.prepend_bos is not None and exported.tokenizer.is_fast:
        text, ids = texts[1], expected[1]
        ids = [trained.bos] * usage.prepend_bos + ids
        found.append((text, ids, exported.tokenizer.encode(text)))
    for text, wanted, ids in found:
        if ids != wanted:
            raise ValueError(
                f"tokenizer {source}: {text!r} has the ids {wanted} in training, and {ids} when "
                "transformers loads the exported folder"
            )


def _write_sentencepiece(tokenizer: SentencePieceTokenizer, folder: Path, usage: Usage) -> None:
    model = SentencePieceModel(tokenizer.processor)
    try:
        backend = fast_tokenizer(model).tokenizer
    except ValueError as error:
        raise ValueError(f"tokenizer {tokenizer.path}: {error}") from error
    config = {f"{name}_token": model.pieces[number] for name, number in model.special.items()}
    # A decoder continues on the right; a mask hides padding on either side.
    config |= {"clean_up_tokenization_spaces": False, "padding_side": "left"}
    _write_fast(backend, config, tokenizer, folder, usage)


def _write_hugging_face(tokenizer: HuggingFaceTokenizer, folder: Path, usage: Usage) -> None:
    loaded = tokenizer.tokenizer
    for path in tokenizer_files(tokenizer.path):
        target = folder / path.relative_to(tokenizer.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    path = folder / TOKENIZER_CONFIG
    config = read_json(path) if path.is_file() else {}
    around = [tokenizer.bos] if usage.prepend_bos else []
    is_as_trained = usage.prepend_bos is None or loaded.encode("a") == around + tokenizer.tokenize(
        "a"
    )
    is_complete = (folder / TOKENIZER).is_file() and "tokenizer_class" in config
    if loaded.is_fast and not (is_as_trained and is_complete):
        special = {f"{name}_token": getattr(loaded, f"{name}_token", None) for name in _SPECIAL}
        config = {
            **{name: token for name, token in special.items() if token is not None},
            "clean_up_tokenization_spaces": loaded.clean_up_tokenization_spaces,
            "padding_side": loaded.padding_side,
            **{key: value for key, value in config.items() if key not in _OF_ONE_CLASS},
        }
        backend = type(loaded.backend_tokenizer).from_str(loaded.backend_tokenizer.to_str())
        _write_fast(backend, config, tokenizer, folder, usage)
    elif usage.prepend_bos is not None:
        write_json(path, _with_usage(config, usage))


def _write_fast(
    backend: tokenizers.Tokenizer,
    config: dict[str, Any],
    tokenizer: Tokenizer,
    folder: Path,
    usage: Usage,
) -> None:
    """Write a tokenizer that needs only the library `tokenizers`, with BOS as in training."""
    from tokenizers.processors import TemplateProcessing

    begin = backend.id_to_token(tokenizer.bos) if usage.prepend_bos else None
    backend.post_processor = TemplateProcessing(
        single=f"{begin} $A" if begin else "$A",
        pair=f"{begin} $A {begin} $B:1" if begin else "$A $B:1",
        special_tokens=[(begin, tokenizer.bos)] if begin else [],
    )
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(folder / TOKENIZER))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    if begin:
        config |= {"add_bos_token": True}
    write_json(folder / TOKENIZER_CONFIG, _with_usage(config, usage))


def _with_usage(config: dict[str, Any], usage: Usage) -> dict[str, Any]:
    length = {"model_max_length": usage.max_length} if usage.max_length else {}
    return {"model_input_names": MODEL_INPUTS, **config, **length}


def _special_ids(tokenizer: HuggingFaceTokenizer) -> dict[str, int]:
    """Return the ids of the special tokens that text can contain in training too."""
    loaded = tokenizer.tokenizer
    ids = dict(zip(loaded.all_special_tokens, loaded.all_special_ids, strict=True))
    return {token: number for token, number in ids.items() if tokenizer.tokenize(token) == [number]}


def _probe_texts(tokenizer: HuggingFaceTokenizer) -> Iterator[str]:
    loaded, size = tokenizer.tokenizer, tokenizer.vocab_size
    odd = {*loaded.all_special_tokens, *loaded.get_added_vocab()}
    step = max(1, size // 2000)
    plain = [tokenizer.detokenize([number]) for number in range(0, size, step)]
    return probe_texts(sorted(odd), plain, tokenizer.detokenize, size)
