"""`coe serve`: vLLM's own server on a trained model, asked over HTTP and stopped."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.serve import engine

pytestmark = pytest.mark.serve

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 900
STOP_LIMIT_S = 60


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def ask(port: int, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read() or "{}")


@pytest.fixture
def server(home: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    port = free_port()
    log = open(tmp_path / "server.log", "w")  # noqa: SIM115 - the server's, until it is stopped
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "megatron_coe.cli.main", "serve"),
            *("--model", home / "quickstart" / "hf", "--port", str(port), "--"),
            *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"),
            *("--chat-template", ROOT / "examples/serve/qa.jinja"),
        ],
        env=engine.environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
    )
    try:
        limit = time.monotonic() + START_LIMIT_S
        while True:
            try:
                ask(port, "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, (tmp_path / "server.log").read_text()[-6000:]
                assert time.monotonic() < limit
                time.sleep(1)
        yield process, port
    finally:
        process.kill()
        process.wait()
        log.close()


def test_the_server_answers_completions_and_chat_and_stops(server, home, prompts, tmp_path):
    process, port = server
    (model,) = [each["id"] for each in ask(port, "/v1/models")["data"]]
    served = {"model": model, "temperature": 0, "max_tokens": 16}

    (direct,) = engine.run(
        home / "quickstart" / "hf", prompts[-1:], (engine.TOGETHER,), tmp_path, max_tokens=16,
        dtype="float32",
    )  # fmt: skip
    completion = ask(
        port,
        "/v1/completions",
        {**served, "prompt": prompts[-1], "return_token_ids": True, "ignore_eos": True},
    )
    assert completion["choices"][0]["token_ids"] == direct.tokens[0]

    question = "What is 3 + 4?"
    chat = {**served, "messages": [{"role": "user", "content": question}]}
    as_prompt = {**served, "prompt": f"query : {question} response :"}
    answer = ask(port, "/v1/chat/completions", chat)["choices"][0]["message"]["content"]
    assert answer and answer == ask(port, "/v1/completions", as_prompt)["choices"][0]["text"]

    children = psutil.Process(process.pid).children(recursive=True)
    bound = [
        connection.laddr.ip
        for each in (psutil.Process(process.pid), *children)
        for connection in each.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]
    assert set(bound) == {"127.0.0.1"}
    process.send_signal(signal.SIGINT)
    assert process.wait(STOP_LIMIT_S) in (0, 130, -signal.SIGINT)
    _, left = psutil.wait_procs(children, timeout=STOP_LIMIT_S)
    assert not left
    log = (tmp_path / "server.log").read_text()
    assert "Traceback" not in log, log[-6000:]
