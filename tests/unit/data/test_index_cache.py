"""The cache of Megatron's index files: whole, verified, shared, and never opened as a pickle."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_coe.data import index_cache
from megatron_coe.data.datasets import build_datasets
from megatron_coe.data.indexed import inspect
from megatron_coe.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS
from megatron_coe.utils.errors import DataError
from tests.faults.payloads import PAYLOADS, Call
from tests.unit.data.texts import random_texts

MakeData = Callable[..., str]


def samples(prefix: str, model: Path, cache: Path, mode: str = "packed") -> list[list[int]]:
    dataset, _ = build_datasets(
        train=[prefix],
        valid=[],
        tokenizer=load_tokenizer(model),
        seq_length=16,
        mode=mode,
        num_samples=(30, None),
        seed=3,
        cache_dir=cache,
    )
    return [dataset[number]["tokens"].tolist() for number in range(30)]


def test_whatever_was_damaged_is_rebuilt_and_reported(
    tmp_path: Path, make_data: MakeData, tokenizer: SentencePieceTokenizer, capfd
) -> None:
    prefix, cache = make_data("a", random_texts(40, 1)), tmp_path / "cache"
    expected = samples(prefix, tokenizer.path, cache)
    (folder,) = cache.iterdir()
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == 5  # three indices, a description, the seal
    capfd.readouterr()
    for name in files:
        content = (folder / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        for damaged in (None, b"", content[:-1], bytes(flipped)):
            (folder / name).unlink()
            if damaged is not None:
                (folder / name).write_bytes(damaged)
            assert samples(prefix, tokenizer.path, cache) == expected
            assert "rebuilding it" in capfd.readouterr().err
            assert index_cache.fault(folder) is None
    before = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    assert samples(prefix, tokenizer.path, cache) == expected
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == before
    assert capfd.readouterr().err == ""
    assert [path.name for path in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", PAYLOADS)
def test_every_payload_is_live_and_none_is_opened(tmp_path: Path, name: str) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "index"
    folder.mkdir()
    payload = PAYLOADS[name](canary)
    (folder / "x-document_index.npy").write_bytes(payload)
    index_cache._write_digests(folder)
    assert index_cache.fault(folder) is not None
    assert not canary.exists()
    if name == "a pickle in a storage" and PARTS_ARE_PARTIALS:
        # Megatron-Core 0.19 disarms this one for the whole process that imports it.
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(payload)
        return
    pickle.loads(payload)
    assert canary.exists()


def test_an_array_of_objects_is_a_fault_though_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    call = Call(os.system, (f"touch {tmp_path / 'canary'}",))
    np.save(folder / "x.npy", np.array([call], dtype=object), allow_pickle=True)
    index_cache._write_digests(folder)
    assert "damaged" in index_cache.fault(folder)
    assert not (tmp_path / "canary").exists()


def test_data_rewritten_at_the_same_time_and_size_is_noticed(
    tmp_path: Path, make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    texts = ["one two three", "1", "12 pears and ten apples"]
    prefix = make_data("a", texts)
    stat, first = os.stat(f"{prefix}.idx"), inspect(prefix)
    prefix = make_data("a", texts[::-1])
    os.utime(f"{prefix}.idx", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = inspect(prefix)
    assert (second.stamp[:2], second.tokens) == (first.stamp[:2], first.tokens)
    assert second.stamp != first.stamp


def test_whoever_comes_second_takes_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "index"

    def make(partial: Path) -> None:
        (partial / "a.npy").write_bytes(b"mine")
        shutil.copytree(partial, folder)  # another run, quicker
        (folder / "a.npy").unlink()
        np.save(folder / "a.npy", np.arange(3))
        index_cache._write_digests(folder)

    index_cache.prepare(folder, make)
    assert np.load(folder / "a.npy").tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/index: .*; data\.cache"):
        index_cache.prepare(tmp_path / "file" / "index", lambda partial: None)


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_an_id_that_a_start_does_not_look_at_is_named_when_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_data: MakeData,
    tokenizer: SentencePieceTokenizer,
    mode: str,
) -> None:
    prefix = make_data("a", ["one two three four"] * 50)
    ids = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r+")
    monkeypatch.setattr("megatron_coe.data.indexed.CHECKED_TOKENS", 16)
    place = next(
        n
        for n in range(len(ids))
        if not any(n in range(s.start, s.stop) for s in _looked_at(len(ids)))
    )
    ids[place] = 5000
    ids.flush()
    document = place // (len(ids) // 50)
    with pytest.raises(DataError, match=rf"token id 5000 in document {document}, but tokenizer"):
        samples(prefix, tokenizer.path, tmp_path / "cache", mode)


def _looked_at(size: int) -> list[slice]:
    from megatron_coe.data.indexed import _sampled

    return list(_sampled(size, 16))
