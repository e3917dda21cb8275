from __future__ import annotations

import codecs
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
    whole = compressed("cut.zst", GOOD * 10_000)
    for name, content in (("cut.jsonl.zst", whole[:-2]), ("plain.jsonl.zst", GOOD)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is a damaged zstd file"):
            list(read_texts([tmp_path / name], Fields()))
    table = tmp_path / "table.parquet"
    table.write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"table.parquet is a damaged parquet file"):
        list(read_texts([table], Fields()))


def compressed(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    if name.endswith(".zst"):
        pa = pytest.importorskip("pyarrow", reason="zstd needs the extra `data`")
        half = len(content) // 2  # frames may follow one another, as `pzstd` and `cat` write them
        parts = (content[:half], content[half:])
        return b"".join(pa.compress(part, "zstd", asbytes=True) for part in parts)
    return content


def test_texts_are_the_same_from_every_format(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet needs the extra `data`")
    import pyarrow.parquet as pq

    records = [{"q": f"a{i}\n∑", "a": f" b{i} " * (i % 7)} for i in range(1500)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    table = tmp_path / "input.parquet"
    columns = {key: [record[key] for record in records] for key in ("q", "a")}
    columns["q"] = pa.array(columns["q"]).dictionary_encode()
    pq.write_table(pa.table(columns), table)
    paths = [table]
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.json.zst"):
        for mark in (b"", codecs.BOM_UTF8):
            paths.append(tmp_path / f"{len(mark)}{name}")
            paths[-1].write_bytes(compressed(name, mark + lines))
    check_inputs(paths, Fields())
    joined = [f"query : {record['q']} response : {record['a']}" for record in records]
    apart = [value for record in records for value in (record["a"], record["q"])]
    for path in paths:
        assert list(read_texts([path], Fields(("q", "a"), question_answer=True))) == joined
        assert list(read_texts([path], Fields(("a", "q")))) == apart


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]
)
def test_every_kind_of_text_column_is_read(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet needs the extra `data`")
    import pyarrow.parquet as pq

    texts = [f"{i} ∑" * (i % 5) for i in range(900)]
    column = pa.array([text.encode() for text in texts]).cast(getattr(pa, kind)())
    columns = [column, *([] if kind.endswith("view") else [column.dictionary_encode()])]
    for number, each in enumerate(columns):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"other": range(900), "text": each}), path)
        assert list(read_texts([path], Fields())) == texts


def test_keys_of_nested_objects(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet needs the extra `data`")
    import pyarrow.parquet as pq

    records = [{"meta": {"n": i, "in": {"text": f"deep {i}"}}, "a.b": f"{i}"} for i in range(3)]
    records = [{**record, "a": {"b": "not meant"}} for record in records]
    table = tmp_path / "input.parquet"
    pq.write_table(pa.Table.from_pylist(records), table)
    lines = jsonl(tmp_path, "".join(json.dumps(record) + "\n" for record in records).encode())
    for path in (table, lines):
        deep = read_texts([path], Fields(("meta.in.text", "a.b")))
        assert list(deep) == ["deep 0", "0", "deep 1", "1", "deep 2", "2"]
        for key in ("meta.text", "meta.in.text.more", "mete.in", "a.b.c"):
            with pytest.raises(ValueError, match=rf"no (key|column) '{key}' \(it has 'meta', "):
                list(read_texts([path], Fields((key,))))
        with pytest.raises(ValueError, match=r"'meta.in' is (a dict|of type struct<.*>), not "):
            list(read_texts([path], Fields(("meta.in",))))
    pq.write_table(pa.Table.from_pylist([*records, {"meta": None, "a.b": "3"}]), table)
    with pytest.raises(ValueError, match=rf"{table}:4: column 'meta.in.text' is null"):
        list(read_texts([table], Fields(("meta.in.text",))))


def test_a_column_that_stands_twice_is_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet needs the extra `data`")
    import pyarrow.parquet as pq

    path, column = tmp_path / "input.parquet", pa.array(["x"])
    pq.write_table(pa.table([column, column, column], names=["text", "text", "good"]), path)
    with pytest.raises(ValueError, match=rf"{path} has the column 'text' 2 times"):
        list(read_texts([path], Fields()))
    assert list(read_texts([path], Fields(("good",)))) == ["x"]


def test_text_file_has_a_text_per_line(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    content = 'één\r\n\n{"text": 1}\nlast'.encode()
    path.write_bytes(content)
    assert list(read_texts([path], Fields())) == ["één", '{"text": 1}', "last"]
    for name in ("b.txt", "b.txt.gz", "b.txt.zst"):
        (tmp_path / name).write_bytes(compressed(name, codecs.BOM_UTF8 + content))
        assert list(read_texts([tmp_path / name], Fields())) == ["één", '{"text": 1}', "last"]
    with pytest.raises(ValueError, match="a text file has no keys"):
        check_inputs([path], Fields(("a", "b")))


def test_positions_reach_the_size_of_all_files(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path, GOOD * 2000), jsonl_gz(tmp_path, GOOD * 2000)]
    paths.append(tmp_path / "input.json.zst")
    paths[-1].write_bytes(compressed(".zst", GOOD * 2000))
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
    (tmp_path / "a.parquet.gz").touch()
    with pytest.raises(ValueError, match=r"a.parquet.gz is not named .jsonl"):
        check_inputs([tmp_path / "a.parquet.gz"], Fields())
    with pytest.raises(ValueError, match="repeats a key"):
        Fields(("a", "a"))
    with pytest.raises(ValueError, match="qa_keys"):
        Fields(("a",), question_answer=True)
