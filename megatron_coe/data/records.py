"""Texts out of JSON lines, plain text and parquet files, with the place of every record.

JSON lines (.jsonl or .json, an object per line) and plain text (.txt, a text per line) may be
compressed (.gz, .zst) and may begin with a UTF-8 byte order mark.

The work is in two halves so that it can be distributed: `read_chunks` cuts files into chunks of raw
records (cheap, one process), and `Fields.texts` turns one raw record into texts (any process).
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import pyarrow

CHUNK_RECORDS = 512
CHUNK_BYTES = 1 << 20

_LINES = (".jsonl", ".json", ".txt")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_TEXT_TYPES = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view"}

# One line of a text file, or the values of the wanted columns of one row of a parquet file.
RawRecord = bytes | tuple[bytes | None, ...]


class RecordError(ValueError):
    """An invalid record; the message has the reason, without its place."""


@dataclass(frozen=True)
class Fields:
    """The values of a record that are text, and whether each is a document or all form one.

    Args:
        keys: names of JSON keys or parquet columns; `a.b` is the key b of the object (the field of
            the struct) a, unless there is a key of just that name. A line of a .txt file is a text
            by itself.
        question_answer: join the two keys as `query : {first} response : {second}`, the form of
            the paper's recipe, instead of one text per key.
    """

    keys: tuple[str, ...] = ("text",)
    question_answer: bool = False

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("keys is empty: name at least one key that holds text")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError(f"keys={list(self.keys)} repeats a key: name each once")
        if self.question_answer and len(self.keys) != 2:
            raise ValueError(f"qa_keys={list(self.keys)}: give the query's key and the response's")

    @property
    def outputs(self) -> int:
        """Number of texts per record."""
        return 1 if self.question_answer else len(self.keys)

    def texts(self, raw: RawRecord, *, plain: bool = False) -> tuple[str, ...]:
        """Return the texts of one record: one per key, or a single one for question and answer.

        Args:
            raw: a line (JSON, or the text itself if `plain`), or the values of a parquet row.

        Raises: RecordError when the record is invalid.
        """
        values = self.values(raw, plain=plain)
        if self.question_answer:
            question, answer = values
            return (f"{question_prompt(question)} {answer}",)
        return values

    def values(self, raw: RawRecord, *, plain: bool = False) -> tuple[str, ...]:
        """Return the value of each key of one record; arguments and errors as in `texts`."""
        if isinstance(raw, bytes):
            return (decode(raw.rstrip(b"\r\n")),) if plain else self._from_json(decode(raw))
        return tuple(self._from_cell(*cell) for cell in zip(self.keys, raw, strict=True))

    def _from_json(self, line: str) -> tuple[str, ...]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not JSON ({error}); a line must hold one object") from error
        if not isinstance(record, dict):
            raise RecordError(f"a JSON object is needed, this is a {type(record).__name__}")
        return tuple(_text_under(key, record) for key in self.keys)

    @staticmethod
    def _from_cell(key: str, value: bytes | None) -> str:
        if value is None:
            raise RecordError(f"column {key!r} is null, not a string")
        return decode(value)


def _text_under(key: str, record: dict[str, Any]) -> str:
    text: Any = record
    for part in [key] if key in record else key.split("."):
        if not isinstance(text, dict) or part not in text:
            raise RecordError(f"no key {key!r} (it has {_listed(record)})")
        text = text[part]
    if not isinstance(text, str):
        raise RecordError(f"key {key!r} is a {type(text).__name__}, not a string")
    check_unicode(key, text)
    return text


def question_prompt(question: str) -> str:
    """Return the begin of a question's text, which a model has to continue.

    The space before the answer is not in it: tokenizers make it part of the answer's first word.
    """
    return f"query : {question} response :"


@dataclass(frozen=True)
class Chunk:
    """Consecutive raw records of one file.

    Attributes:
        first: number of the first record, counted from 1 (line of the file, or row of the table).
        plain: each record is a text by itself (.txt).
        position: bytes on disk read up to the end of this chunk, over all files.
    """

    path: Path
    first: int
    records: list[RawRecord]
    position: int
    plain: bool = False

    def place(self, offset: int) -> str:
        """Return `file:number` of the record at `offset` in this chunk."""
        return f"{self.path}:{self.first + offset}"


def check_inputs(paths: Sequence[Path], fields: Fields) -> None:
    """Check that all files can be read, before any work.

    Raises: ValueError for a file that is missing or of a format without these fields.
    """
    if not paths:
        raise ValueError("no input file: name at least one")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"input {path} is not a file")
        kind, compression = _kind(path)
        if kind not in _LINES and (kind, compression) != (".parquet", ""):
            raise ValueError(
                f"input {path} is not named .jsonl, .json, .txt (any of them followed by .gz or "
                ".zst) or .parquet"
            )
        if ".parquet" in kind or ".zst" in compression:
            _pyarrow(path)
        if kind == ".txt" and (fields.question_answer or fields.outputs > 1):
            raise ValueError(f"input {path}: a text file has no keys {', '.join(fields.keys)}")


def read_chunks(paths: Sequence[Path], fields: Fields) -> Iterator[Chunk]:
    """Yield the records of several files in order.

    Raises: ValueError naming the file when it cannot be read at all (gzip, parquet) or lacks a
        column.
    """
    before = 0
    for path in paths:
        chunks = _parquet_chunks if path.suffix == ".parquet" else _text_file_chunks
        for chunk in chunks(path, fields.keys):
            yield replace(chunk, position=before + chunk.position)
        before += path.stat().st_size


def read_texts(paths: Sequence[Path], fields: Fields) -> Iterator[str]:
    """Yield every text of several files, in order.

    Raises: ValueError with file and line number at the first invalid record.
    """
    return chain.from_iterable(_read(paths, fields, fields.texts))


def read_values(paths: Sequence[Path], fields: Fields) -> Iterator[tuple[str, ...]]:
    """Yield the values of the keys of each record of several files; errors as in `read_texts`."""
    return _read(paths, fields, fields.values)


def _read(
    paths: Sequence[Path], fields: Fields, parse: Callable[..., tuple[str, ...]]
) -> Iterator[tuple[str, ...]]:
    for chunk in read_chunks(paths, fields):
        for offset, record in enumerate(chunk.records):
            if is_blank(record):
                continue
            try:
                yield parse(record, plain=chunk.plain)
            except RecordError as error:
                raise ValueError(f"{chunk.place(offset)}: {error}") from error


def is_blank(record: RawRecord) -> bool:
    """Return whether a line is white space, as editors leave at the end of a file: no record."""
    return isinstance(record, bytes) and not record.strip()


def _kind(path: Path) -> tuple[str, str]:
    """Return the format and the compression (or "") of a file by its name."""
    compression = path.suffix if path.suffix in _COMPRESSIONS else ""
    return Path(path.name.removesuffix(compression)).suffix, compression


def _text_file_chunks(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    _, compression = _kind(path)
    with path.open("rb") as raw:
        try:
            with _decompressed(path, raw, compression) as lines:
                yield from _line_chunks(path, raw, lines)
        except (EOFError, zlib.error, OSError) as error:
            if (
                getattr(error, "errno", None) is not None
            ):  # an error of the disk, not of the content
                raise
            kind = _COMPRESSIONS[compression]
            raise ValueError(f"{path} is a damaged {kind} file ({error})") from error


def _decompressed(
    path: Path, raw: BinaryIO, compression: str
) -> AbstractContextManager[Iterable[bytes]]:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".zst":
        # pyarrow is in the extra anyway; it reads consecutive frames
        return io.BufferedReader(_pyarrow(path).CompressedInputStream(raw, "zstd"))
    return nullcontext(raw)


def _line_chunks(path: Path, raw: BinaryIO, lines: Iterable[bytes]) -> Iterator[Chunk]:
    first, size, plain = 1, 0, _kind(path)[0] == ".txt"
    records: list[RawRecord] = []
    for line in lines:
        if first == 1 and not records:
            line = line.removeprefix(codecs.BOM_UTF8)
        records.append(line)
        size += len(line)
        if len(records) == CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield Chunk(path, first, records, raw.tell(), plain)
            first, size, records = first + len(records), 0, []
    if records:
        yield Chunk(path, first, records, raw.tell(), plain)


def _parquet_chunks(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    pa = _pyarrow(path)
    import pyarrow.parquet as pq

    file_bytes, first = path.stat().st_size, 1
    try:
        with pq.ParquetFile(path) as table:
            places = [_column(path, key, table.schema_arrow) for key in keys]
            for batch in table.iter_batches(batch_size=CHUNK_RECORDS, columns=list(keys)):
                # As bytes: a value that is not UTF-8 is then an invalid record, not a bad file.
                columns = [_as_bytes(batch, place).to_pylist() for place in places]
                records: list[RawRecord] = list(zip(*columns, strict=True))
                position = file_bytes * (first + len(records) - 1) // table.metadata.num_rows
                yield Chunk(path, first, records, position)
                first += len(records)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is a damaged parquet file ({error})") from error


def _column(path: Path, key: str, schema: pyarrow.Schema) -> list[str]:
    """Check the column of a key; return its name and those of the nested fields."""
    import pyarrow as pa

    place, kind = [key] if key in schema.names else key.split("."), pa.struct(list(schema))
    for name in place:
        found = kind.get_all_field_indices(name) if pa.types.is_struct(kind) else []
        if not found:
            raise ValueError(f"{path} has no column {key!r} (it has {_listed(schema.names)})")
        if len(found) > 1:
            raise ValueError(
                f"{path} has the column {key!r} {len(found)} times: rename all but one"
            )
        kind = kind.field(found[0]).type
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(value_type) not in _TEXT_TYPES:
        raise ValueError(f"{path}: column {key!r} is of type {kind}, not string")
    return place


def _as_bytes(batch: pyarrow.RecordBatch, place: Sequence[str]) -> pyarrow.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = batch.column(place[0])
    if len(place) > 1:
        column = pc.struct_field(column, list(place[1:]))
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_binary())


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: {path.suffix[1:]} needs the package pyarrow: `pip install pyarrow`"
        ) from error
    return pyarrow


def decode(raw: bytes) -> str:
    """Return the text of bytes in UTF-8. Raises: RecordError."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 (byte {error.start}: {error.reason})") from error


def check_unicode(key: str, text: str) -> None:
    """Raise RecordError for a text that cannot be encoded."""
    # JSON may escape half of a surrogate pair, which no tokenizer can encode.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"key {key!r} holds a lone surrogate at {error.start}") from error


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "") or "none"
