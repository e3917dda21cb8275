"""Text to training samples: corpus, tokenizer, preprocessing, datasets.

    records.py         texts out of JSON lines, plain text and parquet, each with its place
    sentences.py       sentence splitting with NLTK's Punkt, offline
    corpus.py          the generated math corpus
    tokenizer.py       one small interface over SentencePiece and Hugging Face tokenizers
    fast_tokenizer.py  a SentencePiece model as a tokenizer of the library `tokenizers`
    preprocess.py      records -> Megatron's .bin/.idx, in parallel
    indexed.py         .bin/.idx pairs, checked before Megatron maps them
    index_cache.py     Megatron's index files: complete, verified, shared
    datasets.py        .bin/.idx -> training and validation samples, packed or padded

Only the last three import Megatron (4 s or more): every preprocessing worker imports the others.
"""
