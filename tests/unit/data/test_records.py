from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_coe.data.records import Fields, check_inputs, read_chunks, read_texts

GOOD = b'{"text": "fine"}\n'


def jsonl(folder: Path, content: bytes) -> Path:
    path = folder / "input.jsonl"
    path.write_bytes(content)
    return path


def jsonl_gz(folder: Path, content: bytes) -> Path:
    path = folder / "input.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    return path


@pytest.mark.parametrize("write", [jsonl, jsonl_gz])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"other": "x", "more": 1}', "no key 'text' .it has 'other', 'more'."),
        (b'{"text": 7}', "key 'text' is a int"),
        (b'{"text": null}', "key 'text' is a NoneType"),
        (b'["text"]', "a JSON object is needed, this is a list"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_broken_line_is_named_with_file_and_number(
    tmp_path: Path, write: Callable[[Path, bytes], Path], line: bytes, reason: str
) -> None:
    # Far enough in to be in another chunk, after a blank line that counts as a line.
    path = write(tmp_path, GOOD * 1000 + b"  \n" + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=rf"{path}:1002: .*{reason}"):
        list(read_texts([path], Fields()))


def test_broken_parquet_row_is_named_with_its_number(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet needs the extra `data`")
    import pyarrow.parquet as pq

    path = tmp_path / "input.parquet"
    pq.write_table(pa.table({"text": ["fine"] * 700 + [None]}), path)
    with pytest.raises(ValueError, match=rf"{path}:701: column 'text' is null"):
        list(read_texts([path], Fields()))
    broken = pa.Array.from_buffers(
        pa.string(), 2, [*pa.array(["aa", "bb"]).buffers()[:2], pa.py_buffer(b"aa\xff\xff")]
    )
    pq.write_table(pa.table({"text": broken}), path)
    with pytest.raises(ValueError, match=rf"{path}:2: not UTF-8"):
        list(read_texts([path], Fields()))
    pq.write_table(pa.table({"other": ["x"]}), path)
    with pytest.raises(ValueError, match=r"no column 'text' \(it has 'other'\)"):
        list(read_texts([path], Fields()))
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(ValueError, match="column 'text' is of type int64, not string"):
        list(read_texts([path], Fields()))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(GOOD * 10_000)[:-20])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz is a damaged gzip file"):
        list(read_texts([cut], Fields()))
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_bytes(GOOD)
    with pytest.raises(ValueError, match=r"plain.jsonl.gz is a damaged gzip file"):
        list(read_texts([plain], Fields()))
    pytest.importorskip("pyarrow", reason="parquet needs the extra `data`")
    table = tmp_path / "table.parquet"
    table.write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"table.parquet is a damaged parquet file"):
        list(read_texts([table], Fields()))


def test_texts_are_the_same_from_every_format(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet needs the extra `data`")
    import pyarrow.parquet as pq

    records = [{"q": f"a{i}\n∑", "a": f" b{i} " * (i % 7)} for i in range(1500)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    table = tmp_path / "input.parquet"
    columns = {key: [record[key] for record in records] for key in ("q", "a")}
    columns["q"] = pa.array(columns["q"]).dictionary_encode()
    pq.write_table(pa.table(columns), table)
    paths = [jsonl(tmp_path, lines), jsonl_gz(tmp_path, lines), table]
    joined = [f"query : {record['q']} response : {record['a']}" for record in records]
    apart = [value for record in records for value in (record["a"], record["q"])]
    for path in paths:
        assert list(read_texts([path], Fields(("q", "a"), question_answer=True))) == joined
        assert list(read_texts([path], Fields(("a", "q")))) == apart


def test_text_file_has_a_text_per_line(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes('één\r\n\n{"text": 1}\nlast'.encode())
    assert list(read_texts([path], Fields())) == ["één", '{"text": 1}', "last"]
    with pytest.raises(ValueError, match="a text file has no keys"):
        check_inputs([path], Fields(("a", "b")))


def test_positions_reach_the_size_of_all_files(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path, GOOD * 2000), jsonl_gz(tmp_path, GOOD * 2000)]
    positions = [chunk.position for chunk in read_chunks(paths, Fields())]
    assert positions == sorted(positions)
    assert positions[-1] == sum(path.stat().st_size for path in paths)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no input file"):
        check_inputs([], Fields())
    with pytest.raises(ValueError, match=r"missing.jsonl is not a file"):
        check_inputs([tmp_path / "missing.jsonl"], Fields())
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a.csv is not named .jsonl"):
        check_inputs([tmp_path / "a.csv"], Fields())
    with pytest.raises(ValueError, match="repeats a key"):
        Fields(("a", "a"))
    with pytest.raises(ValueError, match="qa_keys"):
        Fields(("a",), question_answer=True)
