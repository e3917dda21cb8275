"""Text to training samples: corpus, tokenizer, preprocessing, datasets.

    errors.py        what can turn out about data in the middle of a run
    files.py         files that get their name only when they are complete
    records.py       texts out of JSON lines, plain text and parquet, each with its place
    sentences.py     sentence splitting with NLTK's Punkt, offline
    corpus.py        the generated math corpus
    tokenizer.py     one small interface over SentencePiece and Hugging Face tokenizers
    preprocess.py    records -> Megatron's .bin/.idx, in parallel
    command_line.py  what the command lines over this package share
    indexed.py       what is in a .bin/.idx pair, checked before Megatron maps it
    index_cache.py   Megatron's index files: whole, verified, shared
    datasets.py      .bin/.idx -> training and validation samples (packed, or one example each)

Only the last three import Megatron (4 s or more); the rest stays light because every preprocessing
worker imports it.
"""
