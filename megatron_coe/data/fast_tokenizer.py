"""A SentencePiece model as a tokenizer of the library `tokenizers` (extra `hf`) with the same ids.

SentencePiece processes a text in full; the library normalizes it, splits it and then processes each
part. Exact in all versions of transformers are:

- White space is kept unless the model's own normalization removes it, and the space that
  SentencePiece puts before a text is put before each part between two special tokens, as before
  each document of training. Decoding keeps that space, because the text of later tokens alone would
  lose the one between it and the prompt.
- Control symbols are special tokens. SentencePiece reads text that spells one as text; users of
  Hugging Face's tokenizers rely on one id.
- User-defined symbols are split off first, each a word of its own.
- Symbols that text cannot spell (control, byte, unused) never result from text.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]  # made at import
    ModelProto,
)

from megatron_coe.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"  # SentencePiece's mark of a space
WHITE_SPACE = (
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\xa0",
    "\u1680",
    "\u2003",
    "\u200b",
    "\u2028",
    "\u2029",
    "\u202f",
    "\u3000",
    "\ufeff",
    " \n ",
    "\n \n",
    " \t",
)
_TEXTS = (
    "",
    "a  b   c",
    "line\nline\r\n\ttab",
    "1234567 + 89 = 3.14159",
    "naïve café, Straße, Ελλάδα, Привет, 你好世界, こんにちは, مرحبا",
    "🙂👩‍👩‍👧 x² ≤ ½ ﬁ Å",
)
_RARE_TEXTS = ("R\u0350", "½\u0301", "\u1112\u1161\u11ab", "\ufffd\u0305")
_RANDOM_TEXTS = 200
_PLAIN_PIECES = 500
_USER_DEFINED = -0.1  # SentencePiece's own score of them, whatever their score in the model
_NEVER = 1e4  # below the lowest score: never chosen
_STAND_INS = 0x10F000  # private characters that no text has


class SentencePieceModel:
    """The pieces of a SentencePiece model by their type."""

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self.processor = processor
        self.proto = ModelProto.FromString(processor.serialized_model_proto())
        self.pieces = [piece.piece for piece in self.proto.pieces]

    @property
    def special(self) -> dict[str, int]:
        """Ids by name, of unk, bos, eos and pad as far as they exist."""
        names = ("unk", "bos", "eos", "pad")
        ids = {name: getattr(self.processor, f"{name}_id")() for name in names}
        return {name: number for name, number in ids.items() if number >= 0}

    @cached_property
    def control(self) -> list[str]:
        """Special tokens in Hugging Face's form, including the one for unknown text."""
        return self._of(ModelProto.SentencePiece.CONTROL, ModelProto.SentencePiece.UNKNOWN)

    @cached_property
    def user_defined(self) -> list[str]:
        """Symbols that the model's author defined."""
        return self._of(ModelProto.SentencePiece.USER_DEFINED)

    @cached_property
    def unspellable(self) -> list[str]:
        """Pieces that never result from text."""
        kinds = ModelProto.SentencePiece
        return self._of(kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE, kinds.UNUSED)

    @cached_property
    def plain(self) -> dict[str, float]:
        """All other pieces, with their scores."""
        normal = ModelProto.SentencePiece.NORMAL
        return {piece.piece: piece.score for piece in self.proto.pieces if piece.type == normal}

    def _of(self, *kinds: int) -> list[str]:
        return [piece.piece for piece in self.proto.pieces if piece.type in kinds]


@dataclass(frozen=True)
class FastTokenizer:
    """A SentencePiece model's form in `tokenizers`."""

    tokenizer: tokenizers.Tokenizer
    warning: str | None
    """A rare text that has other ids in it; None: none is known."""


def fast_tokenizer(model: SentencePieceModel) -> FastTokenizer:
    """Rebuild a SentencePiece model, and check it on all special pieces and many texts.

    Raises:
        ValueError: no such tokenizer has its ids; the message names a text.
        ModuleNotFoundError: the library is not installed.
    """
    tokenizer, warning = _convert(model), None
    for text, ids, other in _differences(model, tokenizer, [*_RARE_TEXTS, *probes(model)]):
        difference = (
            f"{text!r} has the ids {other} in its Hugging Face form, and {ids} in the model itself"
        )
        if text not in _RARE_TEXTS and not _is_tie(model, ids, other):
            raise ValueError(f"it has no exact Hugging Face form: {difference}")
        warning = warning or f"rare texts differ: {difference}"
    return FastTokenizer(tokenizer, warning)


def export_warning(tokenizer: Tokenizer) -> str | None:
    """Describe how this tokenizer would differ in a Hugging Face folder; None: no known difference.

    For use before preprocessing and training, when another tokenizer can still be chosen.
    """
    try:
        if isinstance(tokenizer, SentencePieceTokenizer):
            reason = fast_tokenizer(SentencePieceModel(tokenizer.processor)).warning
        else:
            assert isinstance(tokenizer, HuggingFaceTokenizer)
            reason = tokenizer.incompatibility()
    except ModuleNotFoundError:  # then nothing can be exported either
        return None
    except ValueError as error:
        reason = f"{error}; to-hf will refuse it"
    return reason and f"tokenizer {tokenizer.path}: {reason}"


def probes(model: SentencePieceModel) -> Iterator[str]:
    """Generate texts that expose differences between a model and its rebuilt form."""
    odd = [*model.unspellable, *model.user_defined]
    plain = sorted(piece.replace(SPACE, " ") for piece in model.plain)
    yield from probe_texts(odd, plain, model.processor.decode, len(model.pieces))
    for symbol in model.user_defined[:1]:
        yield from (symbol + piece for piece in (*odd, *plain[:: max(1, len(plain) // 300)]))


def probe_texts(
    odd: Sequence[str], plain: Sequence[str], decode: Callable[[list[int]], str], size: int
) -> Iterator[str]:
    """Generate texts with every odd piece, some plain ones, and all kinds of white space.

    Args:
        decode: returns the text of ids in [0, size).
    """
    yield from _TEXTS
    for space in WHITE_SPACE:
        yield from (space, f"{space}a", f"a{space}", f"{space}a{space}b1{space}.{space}")
    for piece in odd:
        yield from (piece, f"a{piece}b", f" {piece} {piece}{piece}\n")
    generator = random.Random(0)
    sample = generator.sample(plain, min(_PLAIN_PIECES, len(plain)))
    yield from sample
    parts = [*odd, *WHITE_SPACE, *"aé1<>", *sample]
    for _ in range(_RANDOM_TEXTS):
        yield "".join(generator.choices(parts, k=generator.randint(1, 12)))
        text = decode(generator.choices(range(size), k=generator.randint(1, 40)))
        yield "".join(c for c in text if c != "\ufffd" and not unicodedata.combining(c))


def _differences(
    model: SentencePieceModel, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Return texts whose ids differ when rebuilt: (text, ids of the model, other ids)."""
    tokenizer.encode_special_tokens = True  # text that spells them is text, as in SentencePiece
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    tokenizer.encode_special_tokens = False
    for text, ids, encoding in zip(texts, model.processor.encode(texts), encodings, strict=True):
        if encoding.ids != ids:
            yield text, ids, encoding.ids


def _is_tie(model: SentencePieceModel, ids: list[int], other: list[int]) -> bool:
    """Return whether a unigram model finds both equally likely, up to rounding of the sums."""
    if model.proto.trainer_spec.model_type != model.proto.trainer_spec.UNIGRAM:
        return False
    pieces = model.proto.pieces
    scores = [sum(pieces[number].score for number in numbers) for numbers in (ids, other)]
    return abs(scores[0] - scores[1]) < 1e-3


def _convert(model: SentencePieceModel) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders

    specification = model.proto.trainer_spec
    if specification.model_type == specification.UNIGRAM:
        tokenizer = Tokenizer(_unigram(model))
        splits: tokenizers.pre_tokenizers.PreTokenizer | None = _unigram_splits(model)
    elif specification.model_type in (specification.BPE, specification.CHAR):
        tokenizer = Tokenizer(_bpe(model))
        splits = _bpe_splits(model)
    else:
        raise ValueError("it has no exact Hugging Face form: models of whole words have none")
    tokenizer.normalizer = _normalizer(model)
    if splits is not None:
        tokenizer.pre_tokenizer = splits
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in model.control])
    return tokenizer


def _unigram(model: SentencePieceModel) -> tokenizers.models.Model:
    from tokenizers.models import Unigram

    worst = min(model.plain.values(), default=0.0)
    scores = dict.fromkeys(model.user_defined, _USER_DEFINED)
    scores |= dict.fromkeys(model.unspellable, worst - _NEVER)
    pieces = [(piece.piece, scores.get(piece.piece, piece.score)) for piece in model.proto.pieces]
    return Unigram(pieces, model.special["unk"], model.proto.trainer_spec.byte_fallback)


def _unigram_splits(model: SentencePieceModel) -> tokenizers.pre_tokenizers.PreTokenizer:
    """Split off unknown characters, which are part of no piece.

    Together they would score lower than a piece that text cannot spell.
    """
    known = {piece for piece in model.plain if len(piece) == 1}
    unknown = f"[^{re.escape(''.join(sorted(known)))}]"
    if not model.proto.trainer_spec.byte_fallback:
        unknown += "+"  # one token for consecutive ones
    return _isolated([piece for piece in model.user_defined if set(piece) - known], unknown)


def _bpe(model: SentencePieceModel) -> tokenizers.models.Model:
    from tokenizers.models import BPE

    return BPE(
        {piece: number for number, piece in enumerate(model.pieces)},
        _merges(model),
        unk_token=model.pieces[model.special["unk"]],
        fuse_unk=True,
        byte_fallback=model.proto.trainer_spec.byte_fallback,
        ignore_merges=bool(model.user_defined),  # a word that is a piece is not split
    )


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Return each pair of pieces that forms a piece, in SentencePiece's order of merging."""
    number = {piece: number for number, piece in enumerate(model.pieces)}
    pairs = []
    for piece, score in model.plain.items():
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [pair for pair in halves if pair[0] in model.plain and pair[1] in model.plain]
        known.sort(key=lambda pair: (number[pair[0]], number[pair[1]]))
        pairs += [(-score, number[piece], pair) for pair in known]
    pairs.sort(key=lambda entry: entry[:2])
    return [pair for _, _, pair in pairs]


def _bpe_splits(model: SentencePieceModel) -> tokenizers.pre_tokenizers.PreTokenizer | None:
    """Split off user-defined symbols, and prevent pieces that text cannot spell."""
    if not model.user_defined:
        return None
    from tokenizers import pre_tokenizers

    names = [piece for piece in model.unspellable if len(piece) > 1]
    first = (rf"\A{re.escape(name[0])}(?={re.escape(name[1:])}\z)" for name in names)
    return pre_tokenizers.Sequence([_isolated(model.user_defined), _isolated([], *first)])


def _isolated(texts: Iterable[str], *patterns: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    """Split off texts, the longest match first, and then patterns."""
    from tokenizers import Regex, pre_tokenizers

    longest_first = sorted(texts, key=len, reverse=True)
    return pre_tokenizers.Split(
        Regex("|".join([*map(re.escape, longest_first), *patterns])), "isolated"
    )


def _normalizer(model: SentencePieceModel) -> tokenizers.normalizers.Normalizer:
    from tokenizers import Regex
    from tokenizers.normalizers import Normalizer, Prepend, Replace, Sequence

    specification = model.proto.normalizer_spec
    prefix = SPACE if specification.add_dummy_prefix else ""
    # The first step: a text of characters that are mapped to nothing would be empty later.
    steps: list[Normalizer] = [Prepend(prefix)] if prefix else []
    if specification.precompiled_charsmap:
        steps += _charsmap(specification.precompiled_charsmap, model.user_defined)
    if specification.remove_extra_whitespaces:
        steps += [Replace(Regex(rf"\A{prefix} +"), prefix), Replace(Regex(" {2,}"), " ")]
    if specification.escape_whitespaces:
        steps.append(Replace(" ", SPACE))
    if specification.remove_extra_whitespaces:
        steps.append(Replace(Regex(rf"[ {SPACE}]+\z"), ""))
    return Sequence(steps)


def _charsmap(charsmap: bytes, user_defined: list[str]) -> list[tokenizers.normalizers.Normalizer]:
    """Map characters as the model does, except in user-defined symbols."""
    from tokenizers import Regex
    from tokenizers.normalizers import Normalizer, Precompiled, Replace

    mapped = Precompiled(charsmap)
    # `mapped` would treat these two as one character, a grapheme cluster of Unicode.
    steps: list[Normalizer] = [Replace(Regex("\r(?=\n)"), mapped.normalize_str("\r")), mapped]
    changed = [symbol for symbol in user_defined if mapped.normalize_str(symbol) != symbol]
    for number, symbol in enumerate(sorted(changed, key=len)):
        stand_in = chr(_STAND_INS + number)
        steps = [Replace(symbol, stand_in), *steps, Replace(stand_in, symbol)]
    return steps
