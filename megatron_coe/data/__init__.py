"""Text to training samples: corpus, tokenizer, preprocessing, datasets.

    records.py     texts out of .jsonl, .jsonl.gz, .parquet and .txt, with the place of every record
    sentences.py   sentence splitting with NLTK's Punkt, offline
    corpus.py      the generated maths corpus
    tokenizer.py   one small interface over SentencePiece and Hugging Face tokenizers
    preprocess.py  records -> Megatron's .bin/.idx, in parallel
    indexed.py     what is in a .bin/.idx pair, checked without loading it
    datasets.py    .bin/.idx -> training and validation samples (packed, or one example each)

Only `datasets.py` imports Megatron (4 s or more); the rest stays light because every preprocessing
worker imports it.
"""
