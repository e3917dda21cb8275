"""The command lines of the data side, run as a user runs them."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import zygote

ROOT = Path(__file__).parents[2]


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def run(tool: str, *arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(tool, *arguments), env=environment(**extra), capture_output=True, text=True
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "texts.txt").write_text("one two three\nfour five six\n" * 20)
    path = folder / "t.model"
    done = run(
        "train_tokenizer", "--input", folder / "texts.txt", "--output", path, "--vocab-size", 285
    )
    assert done.returncode == 0, done.stderr
    return path


def test_from_nothing_to_token_files(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym", reason="the corpus needs the extra `data`")
    for name, seed in (("a", "1"), ("b", "2")):
        done = run(
            "make_corpus", *("--output", tmp_path / name, "--train-size", 300),
            *("--valid-size", 40), PYTHONHASHSEED=seed,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    train, valid = tmp_path / "a" / "train.jsonl", tmp_path / "a" / "valid.jsonl"
    assert names(tmp_path / "a") == ["train.jsonl", "valid.jsonl"]
    assert train.read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()
    assert valid.read_bytes() == (tmp_path / "b" / "valid.jsonl").read_bytes()

    model = tmp_path / "t.model"
    text = ("--qa-keys", "query", "response")
    done = run("train_tokenizer", "--input", train, *text, "--vocab-size", 600, "--output", model)
    assert (done.returncode, done.stdout) == (0, f"{model} (600 pieces)\n"), done.stderr
    prefix = tmp_path / "out" / "both"
    done = run(
        "preprocess_data", "--input", train, valid, *text, "--tokenizer", model,
        *("--output-prefix", prefix, "--workers", 2, "--append-eod"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{prefix}.bin/.idx: 340 documents, ")
    assert done.stderr == ""
    assert names(tmp_path / "out") == ["both.bin", "both.idx"]


def test_broken_line_ends_with_its_place_and_a_status(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two}\n{"text": "three"}\n')
    arguments = ("--input", path, "--tokenizer", model, "--output-prefix", tmp_path / "out")
    done = run("preprocess_data", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path}:2: not JSON")
    assert names(tmp_path) == ["in.jsonl"]
    done = zygote.run("tools/preprocess_data.py", *arguments, "--skip-bad-lines")
    assert done.returncode == 0
    assert done.stderr.startswith(f"skipped {path}:2: not JSON")
    assert "2 documents" in done.stdout
    assert done.stdout.endswith("1 broken records skipped\n")


@pytest.mark.parametrize(
    ("tool", "changes", "message"),
    [
        ("preprocess_data", {"--input": "none.jsonl"}, "none.jsonl is not a file"),
        ("preprocess_data", {"--tokenizer": "none.model"}, "none.model does not exist"),
        ("preprocess_data", {"--tokenizer": "in.jsonl"}, "is not a SentencePiece model"),
        ("preprocess_data", {"--workers": "0"}, "workers=0"),
        ("train_tokenizer", {"--input": "none.jsonl"}, "none.jsonl is not a file"),
        ("train_tokenizer", {"--vocab-size": "99999"}, "vocab_size=99999"),
        ("make_corpus", {"--train-size": "0"}, "train_size=0"),
    ],
)
def test_wrong_arguments_are_one_line(
    tmp_path: Path, model: Path, tool: str, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n')
    options = {
        "preprocess_data": {
            "--input": "in.jsonl",
            "--tokenizer": str(model),
            "--output-prefix": "out",
        },
        "train_tokenizer": {"--input": "in.jsonl", "--output": "new.model"},
        "make_corpus": {"--output": "corpus"},
    }[tool] | changes
    done = subprocess.run(
        command(tool, *(word for option in options.items() for word in option)),
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert names(tmp_path) == ["in.jsonl"]


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_disk_error_is_told_and_leaves_nothing(tmp_path: Path, model: Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out"
    path.write_text('{"text": "one two three"}\n' * 20_000)
    rest = ("--tokenizer", model, "--output-prefix", output / "x")
    done = subprocess.run(
        command("preprocess_data", "--input", path, *rest),
        env=environment(),
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    expected = f"error: cannot write {output / 'x_text_document.bin'}: File too large\n"
    lines = done.stderr.splitlines(keepends=True)
    assert lines[-1] == expected
    assert all("documents]" in line for line in lines[:-1]), "progress alone, on a slow machine"
    assert names(output) == []


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_leaves_no_process_and_no_file(
    tmp_path: Path, model: Path, number: signal.Signals
) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out"
    line = json.dumps({"text": "one two three four five six " * 2000})
    path.write_text(f"{line}\n" * 60)
    rest = ("--tokenizer", model, "--output-prefix", output / "x")
    process = zygote.shared().start(
        "tools/preprocess_data.py",
        ["--input", *[path] * 50, *rest, "--workers", 2],
        tmp_path,
        environment(),
    )
    # Both workers and the resource tracker of multiprocessing.
    wait_for(lambda: len(psutil.Process(process.pid).children()) == 3)
    children = psutil.Process(process.pid).children()
    if number is signal.SIGKILL:
        process.send(number)
    else:
        os.killpg(process.pid, number)  # as a terminal does: to every process of the group
    status = process.wait(120)
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert len(gone) == 3
    if number is not signal.SIGKILL:
        assert process.complained() == "interrupted; nothing was written\n"
        assert status == 130
        assert names(output) == []
