"""Texts to Megatron's `.bin/.idx` token files, on several processes.

One process reads and writes, the others parse and tokenize. Results are written in the order of the
input whatever the number of workers, so the files are the same bytes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_coe.data.chat import ChatFields, answers_prefix, check_chat, encode_conversation
from megatron_coe.data.fast_tokenizer import export_warning
from megatron_coe.data.records import (
    Chunk,
    Fields,
    RawRecord,
    RecordError,
    check_inputs,
    is_blank,
    read_chunks,
)
from megatron_coe.data.sentences import SentenceSplitter, load_splitter
from megatron_coe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_coe.utils.files import naming_errors, partial_path

CHUNKS_PER_WORKER = 4  # in flight, to bound memory
BAD_LINES_SHOWN = 10
SECONDS_BETWEEN_LINES = 15.0


@dataclass
class Summary:
    """The counts of a preprocessing run.

    Attributes:
        tokens: written, per output prefix.
        documents: written, per output prefix.
        empty: texts without any token, which are left out.
        bad_lines: invalid records that were skipped.
        splitter: description of the sentence splitter; None if sentences were not split.
    """

    tokens: dict[str, int]
    documents: dict[str, int]
    empty: int = 0
    bad_lines: int = 0
    splitter: str | None = None
    answers: int | None = None
    """Tokens that are answers; None: they were not asked for."""


@dataclass
class _Encoded:
    """A chunk in tokens: for each output all its ids, and each document's sentence lengths."""

    ids: list[np.ndarray]
    documents: list[list[list[int]]]
    empty: int
    bad_lines: list[str]
    position: int


class _Encoder:
    """Tokenizer of raw records; each worker has one."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        fields: Fields,
        append_eod: bool,
        splitter: SentenceSplitter | None,
        prepend_bos: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._fields = fields
        self._prefix = [tokenizer.bos] if prepend_bos else []
        self._suffix = [tokenizer.eod] if append_eod else []
        self._splitter = splitter

    @property
    def dtypes(self) -> list[type[np.integer]]:
        """Of each output: as Megatron's `DType.optimal_dtype`, too slow to import in a worker."""
        of_ids = np.uint16 if self._tokenizer.vocab_size < 65500 else np.int32
        if isinstance(self._fields, ChatFields):
            return [of_ids, np.uint8]
        return [of_ids] * self._fields.outputs

    def __call__(self, chunk: Chunk) -> _Encoded:
        ids: list[list[int]] = [[] for _ in self.dtypes]
        documents: list[list[list[int]]] = [[] for _ in ids]
        empty, bad_lines = 0, []
        for offset, record in enumerate(chunk.records):
            if is_blank(record):
                continue
            try:
                found = self._append_record(record, chunk.plain, ids)
            except RecordError as error:
                bad_lines.append(f"{chunk.place(offset)}: {error}")
                continue
            for output, lengths in enumerate(found):
                if lengths:
                    documents[output].append(lengths)
                else:
                    empty += 1
        arrays = [np.array(each, dtype=dtype) for each, dtype in zip(ids, self.dtypes, strict=True)]
        return _Encoded(arrays, documents, empty, bad_lines, chunk.position)

    def _append_record(
        self, record: RawRecord, plain: bool, ids: list[list[int]]
    ) -> list[list[int]]:
        """Append a record to each output's `ids`; return the lengths of its sentences in each."""
        fields = self._fields
        if isinstance(fields, ChatFields):
            marked = encode_conversation(self._tokenizer, fields, record, self._prefix)
            for output, values in zip(ids, marked, strict=True):
                output += values
            return [[len(values)] for values in marked]
        texts = fields.texts(record, plain=plain)
        return [self._append(text, output) for text, output in zip(texts, ids, strict=True)]

    def _append(self, text: str, ids: list[int]) -> list[int]:
        """Append a document's tokens to `ids`; return the lengths of its sentences, [] if empty."""
        lengths: list[int] = []
        for sentence in self._splitter.tokenize(text) if self._splitter else [text]:
            tokens = self._tokenizer.tokenize(sentence)
            if tokens:
                tokens = tokens if lengths else self._prefix + tokens
                ids += tokens
                lengths.append(len(tokens))
        if lengths and self._suffix:
            ids += self._suffix
            lengths[-1] += 1
        return lengths


class _Writer:
    """One `.bin/.idx` pair, under temporary names until `commit`."""

    def __init__(self, prefix: str, dtype: type[np.integer]) -> None:
        # Megatron is imported here, and so never in a worker.
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._paths = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
        self._partial = [partial_path(path) for path in self._paths]
        with naming_errors(self._paths[0]):
            self._paths[0].parent.mkdir(parents=True, exist_ok=True)
            self._builder = IndexedDatasetBuilder(str(self._partial[0]), dtype)

    def add(self, ids: np.ndarray, documents: list[list[int]]) -> None:
        start = 0
        for lengths in documents:
            end = start + sum(lengths)
            with naming_errors(self._paths[0]):
                self._builder.add_document(ids[start:end], lengths)
            start = end

    def finish(self) -> None:
        """Write everything, still under the temporary names."""
        with naming_errors(self._paths[0]):
            self._builder.finalize(str(self._partial[1]))

    def retract(self) -> None:
        """Remove the index that is there, and the pair that marks the answers among its tokens."""
        # Without the old index in between, a new .bin is never read with the old .idx.
        answers = answers_prefix(str(self._paths[0].with_suffix("")))
        with naming_errors(self._paths[0]):
            for path in (self._paths[1], Path(f"{answers}.idx"), Path(f"{answers}.bin")):
                path.unlink(missing_ok=True)

    def commit(self) -> None:
        with naming_errors(self._paths[0]):
            for partial, path in zip(self._partial, self._paths, strict=True):
                os.replace(partial, path)

    def discard(self) -> None:
        with suppress(OSError):  # closing flushes, which fails again on a full disk
            self._builder.data_file.close()
        for partial in self._partial:
            partial.unlink(missing_ok=True)


def output_prefixes(prefix: Path, fields: Fields, split_sentences: bool = False) -> list[str]:
    """Return the paths of the outputs without suffix.

    They are Megatron-LM's `{prefix}_{key}_document` for each key (`_sentence` when sentences are
    split), or `{prefix}` itself for questions and answers; for conversations also the pair that
    says which tokens are answers.
    """
    if isinstance(fields, ChatFields):
        return [str(prefix), answers_prefix(str(prefix))]
    if fields.question_answer:
        return [str(prefix)]
    level = "sentence" if split_sentences else "document"
    return [f"{prefix}_{key}_{level}" for key in fields.keys]


def preprocess(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer_path: Path,
    *,
    fields: Fields,
    workers: int = 1,
    append_eod: bool = False,
    prepend_bos: bool = False,
    split_sentences: bool = False,
    skip_bad_lines: bool = False,
    quiet: bool = False,
) -> Summary:
    """Tokenize input files into Megatron's `.bin/.idx` pairs (see `output_prefixes`).

    Existing outputs are replaced at the end; a run that fails leaves nothing behind. Workers, if
    several, are spawned processes: call it from under `if __name__ == "__main__":`.

    Args:
        workers: processes that tokenize; 1: this process does.
        append_eod: end each document with the tokenizer's end-of-document token.
        prepend_bos: begin each document with the tokenizer's BOS. Training records it, and
            generation begins a prompt likewise.
        split_sentences: store each sentence as a sequence of its own within its document.
        skip_bad_lines: report and count invalid records instead of stopping at the first.
        quiet: show no progress.

    Returns: the counts of what was written and left out.

    Raises: ValueError for arguments, or naming file and line of the first invalid record; OSError
        when writing fails.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: at least 1 is needed")
    if prefix.name in ("", "..") or prefix.is_dir():
        raise ValueError(f"output prefix {prefix} is a folder: add a name for the files")
    check_inputs(inputs, fields)
    tokenizer = load_tokenizer(tokenizer_path)
    _check_special_tokens(tokenizer, append_eod, prepend_bos)
    if isinstance(fields, ChatFields):
        check_chat(tokenizer, fields, prepend_bos)
        if append_eod or split_sentences:
            raise ValueError(
                "append_eod, split_sentences: a conversation ends as its chat template or its "
                "response says, and is not split; leave both out"
            )
    splitter, origin = None, None
    if split_sentences:
        splitter, origin = load_splitter(_valid_texts(inputs, fields))
    encoder = _Encoder(tokenizer, fields, append_eod, splitter, prepend_bos)
    names = output_prefixes(prefix, fields, split_sentences)
    summary = Summary(dict.fromkeys(names, 0), dict.fromkeys(names, 0), splitter=origin)
    chunks = _encode(read_chunks(inputs, fields), encoder, workers)
    with (
        _progress_bar(sum(map(os.path.getsize, inputs)), quiet) as bar,
        _writers(names, encoder.dtypes) as writers,
        closing(chunks),
    ):
        if warning := export_warning(tokenizer):
            tqdm.write(warning, file=sys.stderr)
        for encoded in chunks:
            if encoded.bad_lines and not skip_bad_lines:
                raise ValueError(f"{encoded.bad_lines[0]} (--skip-bad-lines leaves such lines out)")
            for line in encoded.bad_lines[: max(0, BAD_LINES_SHOWN - summary.bad_lines)]:
                tqdm.write(f"skipped {line}", file=sys.stderr)
            _account(encoded, names, summary)
            if isinstance(fields, ChatFields):
                summary.answers = (summary.answers or 0) + int(encoded.ids[1].sum())
            for writer, ids, documents in zip(writers, encoded.ids, encoded.documents, strict=True):
                writer.add(ids, documents)
            most = max(summary.documents.values())
            bar.set_postfix_str(f"{most:,} documents", refresh=False)
            bar.update(encoded.position - bar.n)
        if not all(summary.documents.values()):
            nothing = [name for name, count in summary.documents.items() if count == 0]
            raise ValueError(f"nothing to write to {nothing[0]}: the input holds no text for it")
    return summary


def _progress_bar(total: int, quiet: bool) -> tqdm:
    """Return a progress bar over bytes: live on a terminal, else a line every few seconds."""
    piped = {}
    if not sys.stderr.isatty():
        intervals = dict.fromkeys(("delay", "mininterval", "maxinterval"), SECONDS_BETWEEN_LINES)
        piped = {"file": _Lines(), **intervals}
    return tqdm(total=total, unit="B", unit_scale=True, disable=quiet, **piped)


class _Lines:
    """A file for tqdm that puts each state of a bar on a line of its own, on stderr."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def _check_special_tokens(tokenizer: Tokenizer, append_eod: bool, prepend_bos: bool) -> None:
    if append_eod and tokenizer.eod < 0:
        raise ValueError(f"append_eod: tokenizer {tokenizer.path} has no end-of-document token")
    if prepend_bos and tokenizer.bos < 0:
        raise ValueError(f"prepend_bos: tokenizer {tokenizer.path} has no BOS token")


def _account(encoded: _Encoded, names: list[str], summary: Summary) -> None:
    summary.empty += encoded.empty
    summary.bad_lines += len(encoded.bad_lines)
    for name, ids, documents in zip(names, encoded.ids, encoded.documents, strict=True):
        summary.tokens[name] += ids.size
        summary.documents[name] += len(documents)


@contextmanager
def _writers(prefixes: list[str], dtypes: list[type[np.integer]]) -> Iterator[list[_Writer]]:
    """Yield writers whose files are renamed together, once the body has succeeded."""
    writers: list[_Writer] = []
    with ExitStack() as cleanup:
        for prefix, dtype in zip(prefixes, dtypes, strict=True):
            writers.append(_Writer(prefix, dtype))
            cleanup.callback(writers[-1].discard)
        yield writers
        for writer in writers:
            writer.finish()
        for writer in writers:
            writer.retract()
        # The answers before their tokens, which would do without them.
        for writer in reversed(writers):
            writer.commit()


def _encode(
    chunks: Iterator[Chunk], encoder: _Encoder, workers: int
) -> Generator[_Encoded, None, None]:
    """Encode chunks in their order, by `workers` processes (1: in this one)."""
    if workers == 1:
        yield from map(encoder, chunks)
        return
    # Spawned, not forked: this process has threads (torch's), and a fork would copy their locks.
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(encoder,)
    )
    pending: deque[Future[_Encoded]] = deque()
    try:
        for chunk in chunks:
            with _interrupts_held():
                pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) == workers * CHUNKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a worker process died (out of memory?): try fewer workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM until the body is done, and for good in a worker started in it.

    Such signals often reach a whole process group, and the parent alone ends the work. Workers
    inherit that they are blocked. In this process they are also caught, because a signal that one
    thread blocks is delivered to another, and Python then handles it in the main thread.
    """
    numbers = {signal.SIGINT, signal.SIGTERM}
    caught: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in numbers}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for first in caught[:1]:
            signal.raise_signal(first)


_worker_encoder: _Encoder


def _start_worker(encoder: _Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker, which would wait for work forever, when its parent has been killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(chunk: Chunk) -> _Encoded:
    return _worker_encoder(chunk)


def _valid_texts(inputs: Sequence[Path], fields: Fields) -> Iterator[str]:
    """Yield every text, without the invalid records."""
    for chunk in read_chunks(inputs, fields):
        for record in chunk.records:
            with suppress(RecordError):
                yield from fields.texts(record, plain=chunk.plain)
