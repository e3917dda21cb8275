"""Malformed data sets and tokenizers, and folders that cannot be written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.faults.commands import TRAIN, Case
from tests.faults.spoil import Make, also, append, cut, folder_at, patch, remove, write


def cases() -> list[Case]:
    return [*_data_files(), *_tokenizers(), *_outputs()]


# --- data sets and what they are made of ----------------------------------------------------------

# Offsets in an index: magic 9, version 8, dtype 1, sequences 8, boundaries 8, lengths 4 each, …
_VERSION, _DTYPE, _SEQUENCES, _BOUNDARIES, _LENGTHS = 9, 17, 18, 26, 34
_DOCUMENTS = 40  # in the data set that every case starts from
_POINTERS = _LENGTHS + 4 * _DOCUMENTS


def _data_files() -> Iterator[Case]:
    def data(name: str, make: Make, *says: str, mode: str = "packed") -> Case:
        return Case(f"data: {name}", f"{TRAIN} data.mode={mode}", says, make)

    yield data("no .bin", remove("a.bin"), "{d}/a.bin does not exist")
    yield data("no .idx", remove("a.idx"), "{d}/a.idx does not exist")
    yield Case("data: neither", f"{TRAIN} 'data.train=[{{d}}/b]'", ("{d}/b.idx does not exist",))
    yield Case(
        "data: named with its suffix",
        f"{TRAIN} 'data.train=[{{d}}/a.bin]'",
        ("{d}/a.bin.idx does not exist", "without .bin"),
    )
    yield Case("data: held-out set is missing", f"{TRAIN} 'data.valid=[{{d}}/b]'", ("{d}/b.idx",))
    yield Case("data: empty name", f"{TRAIN} \"data.train=['']\"", ("data.train",))
    yield data("folder as .bin", folder_at("a.bin"), "{d}/a.bin")
    yield data(".bin cut short", cut("a.bin", 0.7), "{d}/a.bin is shorter than", "bytes")
    yield data(".bin empty", write("a.bin", b""), "{d}/a.bin is shorter than")
    yield data(".bin too long", append("a.bin", "more"), "{d}/a.bin is longer than")
    yield data(".idx empty", write("a.idx", b""), "{d}/a.idx is not an index")
    yield data(".idx is text", write("a.idx", "hello " * 40), "{d}/a.idx is not an index")
    yield data(".idx cut in its header", cut("a.idx", 0.02), "{d}/a.idx is not an index")
    yield data(".idx cut short", cut("a.idx", 0.8), "{d}/a.idx is cut short")
    yield data(".idx too long", append("a.idx", "more than it counts"), "{d}/a.idx")
    yield data(".idx of another version", patch("a.idx", _VERSION, "<Q", 2), "{d}/a.idx", "version")
    yield data(".idx of an unknown dtype", patch("a.idx", _DTYPE, "<B", 99), "{d}/a.idx", "99")
    yield data(".idx of real numbers", patch("a.idx", _DTYPE, "<B", 6), "{d}/a.idx", "float64")
    yield data(".idx of another dtype", patch("a.idx", _DTYPE, "<B", 4), "{d}/a.bin is shorter")
    yield data(".idx counts 2^60", patch("a.idx", _SEQUENCES, "<Q", 1 << 60), "{d}/a.idx is cut")
    yield data(".idx counts below 0", patch("a.idx", _SEQUENCES, "<q", -1), "{d}/a.idx is cut")
    yield data(".idx counts nothing", patch("a.idx", _SEQUENCES, "<Q", 0), "{d}/a")
    yield data(".idx has no document", patch("a.idx", _BOUNDARIES, "<Q", 1), "{d}/a")
    yield data("length below 0", patch("a.idx", _LENGTHS + 8, "<i", -5), "{d}/a.idx", "-5")
    yield data(
        "length too large", patch("a.idx", _LENGTHS + 8, "<i", 1 << 30), "{d}/a.bin is shorter"
    )
    yield data(
        "offset beyond the end",
        patch("a.idx", _POINTERS + 80, "<q", 1 << 40),
        "{d}/a.idx",
        "offset",
    )
    yield data("offset below 0", patch("a.idx", _POINTERS + 80, "<q", -8), "{d}/a.idx", "offset")
    yield data(
        "document beyond the end", patch("a.idx", -16, "<q", 1 << 33), "{d}/a.idx", "document"
    )
    yield data("documents out of order", patch("a.idx", -40, "<q", 1), "{d}/a.idx", "document")
    yield data("last document left out", patch("a.idx", -8, "<q", 39), "{d}/a.idx", "document")
    yield data(
        "id beyond the vocabulary",
        patch("a.bin", 100, "<H", 60_000),
        "{d}/a.bin",
        "60000",
        "290",
        "preprocess",
        "document",
    )
    yield data("last id beyond the vocabulary", patch("a.bin", -2, "<H", 290), "{d}/a.bin", "290")
    yield Case(
        "data: another tokenizer's",
        f"{TRAIN} data.tokenizer={{d}}/small.model",
        ("{d}/small.model", "preprocess"),
        _small_tokenizer,
    )
    yield Case(
        "data: too little for a sample",
        f"{TRAIN} model.seq_length=4096",
        ("{d}/a", "seq_length=4096"),
    )
    yield Case(
        "data: cache is a file",
        f"{TRAIN} data.cache={{d}}/in.txt",
        ("{d}/in.txt", "data.cache"),
        late=True,
    )
    yield Case(
        "data: cache in /proc",
        f"{TRAIN} data.cache=/proc/none",
        ("/proc/none", "data.cache"),
        late=True,
    )


def _small_tokenizer(folder: Path) -> None:
    """A tokenizer with fewer pieces: the last ones are cut off the model."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString((folder / "t.model").read_bytes())
    del model.pieces[262:]
    (folder / "small.model").write_bytes(model.SerializeToString())


def _tokenizers() -> Iterator[Case]:
    def tokenizer(name: str, make: Make | None, path: str, *says: str) -> Case:
        return Case(f"tokenizer: {name}", f"{TRAIN} data.tokenizer={path}", says, make)

    yield tokenizer("not named", None, "''", "data.tokenizer")
    yield tokenizer("missing", remove("t.model"), "{d}/t.model", "{d}/t.model does not exist")
    yield tokenizer("empty", write("t.model", b""), "{d}/t.model", "{d}/t.model", "SentencePiece")
    yield tokenizer(
        "text", write("t.model", "hello"), "{d}/t.model", "{d}/t.model", "SentencePiece"
    )
    yield tokenizer("cut short", cut("t.model", 0.5), "{d}/t.model", "{d}/t.model", "SentencePiece")
    yield tokenizer("empty folder", folder_at("tok"), "{d}/tok", "{d}/tok", "tokenizer.json")
    yield tokenizer("broken JSON", write("tok/tokenizer.json", "{"), "{d}/tok", "{d}/tok")
    yield tokenizer(
        "JSON of something else", write("tok/tokenizer.json", "{}"), "{d}/tok", "{d}/tok"
    )
    yield tokenizer(
        "unknown class",
        also(
            write("tok/tokenizer.json", "{}"),
            write("tok/tokenizer_config.json", '{"tokenizer_class": "Nothing"}'),
        ),
        "{d}/tok",
        "{d}/tok",
    )
    yield Case(
        "tokenizer: a chain of folders",
        f"{TRAIN} data.tokenizer={{d}}/t.model/x",
        ("{d}/t.model/x",),
    )
    yield Case(
        "tokenizer: without end of document",
        "tools/preprocess_data.py --input {d}/in.txt --append-eod --output-prefix {d}/x "
        "--tokenizer {d}/t.model",
        ("{d}/t.model", "end-of-document", "append"),
        _without_end,
    )


def _without_end(folder: Path) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString((folder / "t.model").read_bytes())
    model.trainer_spec.eos_id = -1
    for piece in model.pieces:
        if piece.piece == "</s>":
            piece.piece, piece.type = "<end>", ModelProto.SentencePiece.NORMAL
    (folder / "t.model").write_bytes(model.SerializeToString())


def _outputs() -> Iterator[Case]:
    yield Case(
        "output: log.dir is a file",
        f"{TRAIN} log.dir={{d}}/in.txt checkpoint.save={{d}}/c",
        ("log.dir={d}/in.txt",),
    )
    yield Case(
        "output: log.dir below a file",
        f"{TRAIN} log.dir={{d}}/in.txt/x checkpoint.save={{d}}/c",
        ("log.dir={d}/in.txt/x",),
    )
    yield Case(
        "output: log.dir cannot be written",
        f"{TRAIN} log.dir=/proc/x checkpoint.save={{d}}/c",
        ("log.dir=/proc/x",),
    )
    yield Case(
        "output: checkpoint.save is a file",
        f"{TRAIN} checkpoint.save={{d}}/in.txt",
        ("checkpoint.save={d}/in.txt",),
    )
    yield Case(
        "output: checkpoint.save cannot be written",
        f"{TRAIN} checkpoint.save=/proc/x",
        ("checkpoint.save=/proc/x",),
    )
    yield Case(
        "output: metrics are a folder",
        TRAIN,
        ("{d}/run/metrics.jsonl",),
        folder_at("run/metrics.jsonl"),
    )
