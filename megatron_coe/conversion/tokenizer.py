"""A SentencePiece model as a Hugging Face tokenizer with the same ids."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from megatron_coe.data.tokenizer import load_tokenizer

SPACE = "▁"  # SentencePiece's mark of a space
UNIGRAM, BPE = 1, 2  # numbers of its model types

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_PROBES = (
    "a",
    " a  b   c ",
    "line\nline\r\n\ttab",
    "1234567 + 89 = 3.14159",
    "naïve café, Straße, Ελλάδα, Привет, 你好世界, こんにちは, مرحبا",
    "🙂👩‍👩‍👧 x² ≤ ½ ﬁ Å",
)
# Text that only looks like special tokens. A unigram model of `tokenizers` takes it for them.
_SPELLED = "<s> </s> <unk> <pad> <0x41>"


def write_tokenizer(source: Path, folder: Path) -> dict[str, int]:
    """Put the tokenizer at `source` (SentencePiece file or Hugging Face folder) into a folder.

    Returns: its special ids, by configuration key (`bos_token_id` and so on).

    Raises: ValueError when no Hugging Face tokenizer gives a SentencePiece model's ids.
    """
    if source.is_dir():
        copy_tokenizer(source, folder)
        tokenizer = load_tokenizer(source)
        ids = {"bos": tokenizer.bos, "eos": tokenizer.eod, "pad": tokenizer.pad}
        return {f"{name}_token_id": number for name, number in ids.items() if number >= 0}
    processor = sentencepiece.SentencePieceProcessor(model_file=str(source))
    tokenizer = _convert(source, processor)
    _verify(source, processor, tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = _special_ids(processor)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # What the model takes; transformers 4 would add token_type_ids.
        "model_input_names": ["input_ids", "attention_mask"],
        # Text that happens to spell a special token is text, as in SentencePiece.
        "split_special_tokens": True,
        **{f"{name}_token": processor.id_to_piece(number) for name, number in special.items()},
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return {f"{name}_token_id": number for name, number in special.items() if name != "unk"}


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy a Hugging Face folder's tokenizer files; whether there were any."""
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return bool(found)


def _special_ids(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    ids = {name: getattr(processor, f"{name}_id")() for name in ("unk", "bos", "eos", "pad")}
    return {name: number for name, number in ids.items() if number >= 0}


def _convert(source: Path, processor: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    proto = ModelProto.FromString(processor.serialized_model_proto())
    kind, fallback = proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = pieces[processor.unk_id()][0]
    if kind == UNIGRAM:
        model = models.Unigram(pieces, processor.unk_id(), fallback)
    elif kind == BPE:
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        merges = _merges(processor, vocabulary)
        model = models.BPE(
            vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback
        )
    else:
        raise ValueError(f"tokenizer {source}: only BPE and unigram models can be converted")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer(proto)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []),
        ]
    )
    special = [pieces[number][0] for number in _special_ids(processor).values()]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
    return tokenizer


def _merges(
    processor: sentencepiece.SentencePieceProcessor, vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the one SentencePiece merges first before others."""
    pairs = []
    for piece, number in vocabulary.items():
        if (
            processor.is_control(number)
            or processor.is_byte(number)
            or processor.is_unknown(number)
        ):
            continue
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        pairs += [(-processor.get_score(number), number, pair) for pair in known]
    pairs.sort(key=lambda entry: entry[:2])
    return [pair for _, _, pair in pairs]


def _normalizer(proto: ModelProto) -> normalizers.Normalizer:
    spec, steps = proto.normalizer_spec, []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _verify(
    source: Path, processor: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer
) -> None:
    """Both must cut every probe alike: texts with all sorts of characters, and random pieces."""
    tokenizer.encode_special_tokens = True
    probes = [*_PROBES, *_random_texts(processor)]
    if isinstance(tokenizer.model, models.BPE):
        probes.append(_SPELLED)
    for text in probes:
        ours = tokenizer.encode(text, add_special_tokens=False).ids
        if ours != processor.encode(text):
            raise ValueError(
                f"tokenizer {source} has no exact Hugging Face form: {text!r} has ids "
                f"{processor.encode(text)} in it and {ours} after conversion"
            )
    tokenizer.encode_special_tokens = False


def _random_texts(processor: sentencepiece.SentencePieceProcessor) -> Iterator[str]:
    generator = random.Random(0)
    numbers = range(processor.get_piece_size())
    for _ in range(500):
        yield processor.decode(generator.choices(numbers, k=generator.randint(1, 40)))
