#!/usr/bin/env bash
# Library: tokenizers 0.23.3 beside sentencepiece 0.2.3 (Python 3.11).
# Behavior: normalizers.Precompiled, given the character map of a SentencePiece model, looks short
#     grapheme clusters up as a whole and, where only the first character is in the map, puts that
#     character's replacement in the place of the whole cluster. SentencePiece itself maps one
#     character after the other: "\r\n" becomes two spaces there and one here, and of one half or
#     the ligature fi with an accent the accent is lost.
# Surprise: the normalizer exists to reproduce that map, and "\r\n" is the line end of many files: a
#     model with nmt_nfkc and without remove_extra_whitespaces gets other ids for every such line.
# Seen: tokenizers 0.23.3, sentencepiece 0.2.3
#     'a\r\nb': tokenizers 'a b', sentencepiece 'a  b'
#     '½́': tokenizers '1⁄2', sentencepiece '1⁄2́'
#     'ﬁ́': tokenizers 'fi', sentencepiece 'fí'
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2

cat > "$work/check.py" << 'EOF'
import io

import sentencepiece
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers.normalizers import Precompiled

sentences = ["alpha beta gamma delta", "one two three four five six seven"] * 20
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences),
    model_writer=model,
    vocab_size=40,
    model_type="bpe",
    normalization_rule_name="nmt_nfkc",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    minloglevel=2,
)
specification = ModelProto.FromString(model.getvalue()).normalizer_spec
precompiled = Precompiled(specification.precompiled_charsmap)
processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def original(text):
    return processor.normalize(text).replace("\u2581", " ")


print(f"tokenizers {tokenizers.__version__}, sentencepiece {sentencepiece.__version__}")
for text in ("a\r\nb", "\u00bd\u0301", "\ufb01\u0301"):
    print(f"{text!r}: tokenizers {precompiled.normalize_str(text)!r}, sentencepiece {original(text)!r}")
for text in ("a b", "\u00bd", "\ufb01", "a\nb"):  # one character at a time they agree
    assert precompiled.normalize_str(text) == original(text)
assert precompiled.normalize_str("a\r\nb") == "a b", "the behavior has changed"
assert original("a\r\nb") == "a  b"
assert precompiled.normalize_str("\u00bd\u0301") == "1\u20442", "the behavior has changed"
assert original("\u00bd\u0301") == "1\u20442\u0301"
EOF
"$work/venv/bin/python" "$work/check.py"
