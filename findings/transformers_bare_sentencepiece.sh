#!/usr/bin/env bash
# Library: transformers 5.23.0 with sentencepiece 0.2.3 (Python 3.11).
# Behavior: AutoTokenizer on a folder with nothing but a SentencePiece BPE model, tokenizer.model,
#     loads without a word and splits the first word of every text otherwise than the model does:
#     no line of 200 gets the model's ids. The space that the model sets before a text is missing.
#     5.24.0 gives the model's ids for all of them.
# Surprise: the model says itself that it adds that space (add_dummy_prefix), the tokenizer is made
#     from it, and most tokens of each line are right, so that a loss only looks a little worse.
# Seen: transformers 5.23.0: 0 of 200 lines have the model's ids
#     beta iota: ['b', 'eta', '▁iota'], the model ['▁beta', '▁iota']
#     transformers 5.24.0: 200 of 200 lines have the model's ids
#     beta iota: ['▁beta', '▁iota'], the model ['▁beta', '▁iota']
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"

cat > "$work/check.py" << 'EOF'
import random
import sys
from pathlib import Path

import sentencepiece
import transformers

folder, expected = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(exist_ok=True)
random.seed(1)
words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
lines = [" ".join(random.choices(words, k=8)) for _ in range(200)]
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_prefix=str(folder / "tokenizer"),
    vocab_size=80,
    model_type="bpe",
    character_coverage=1.0,
    minloglevel=2,
)
(folder / "tokenizer.vocab").unlink()
model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
same = sum(tokenizer.encode(line, add_special_tokens=False) == model.encode(line) for line in lines)
print(f"transformers {transformers.__version__}: {same} of 200 lines have the model's ids")
text = "beta iota"
print(f"{text}: {tokenizer.tokenize(text)}, the model {model.encode(text, out_type=str)}")
assert same == expected, "the behavior has changed"
EOF
for pair in 5.23.0=0 5.24.0=200; do
    "$work/venv/bin/pip" install -q "transformers==${pair%=*}" sentencepiece==0.2.3 protobuf==7.36.2
    "$work/venv/bin/python" -W ignore "$work/check.py" "$work/folder" "${pair#*=}"
done
