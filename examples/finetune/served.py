"""Serve a model with vLLM, ask it held-out questions over its chat API, and stop it.

python examples/finetune/served.py --input chats.jsonl --samples 256 my-chat-model
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

AT_ONCE = 16
START_LIMIT_S = 600
OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", str(AT_ONCE)),
    *("--kv-cache-memory-bytes", str(2**30)),  # by itself vLLM takes nearly all of the memory
)


def main() -> None:
    options = parse()
    with options.input.open(encoding="utf-8") as lines:
        chats = [json.loads(line)["messages"] for line in islice(lines, options.samples)]
    for folder in options.models:
        with server(folder) as url, ThreadPoolExecutor(AT_ONCE) as pool:
            started_s = time.perf_counter()
            bodies = [
                {"messages": chat[:-1], "temperature": 0, "max_tokens": options.max_new_tokens}
                for chat in chats
            ]
            replies = list(pool.map(lambda body: reply(url, body), bodies))
            seconds = time.perf_counter() - started_s
        right = sum(
            final_answer(text) == final_answer(chat[-1]["content"])
            for text, chat in zip(replies, chats, strict=True)
        )
        share = right / len(replies)
        print(
            f"{folder}, served: {right} of {len(replies)} right, exact match {share:.3f} "
            f"({seconds:.0f} s)"
        )


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Run `coe serve`, and give its address; its log is beside the folder."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder.parent / "server.log"
    command = (sys.executable, "-m", "megatron_coe.cli.main", "serve", "--model", str(folder))
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--", *OPTIONS], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        limit_s = time.monotonic() + START_LIMIT_S
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > limit_s:
                raise SystemExit(f"the server did not start: {log}")
            time.sleep(1)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=10).status == 200
    except OSError:  # none listens yet
        return False


def reply(url: str, body: dict[str, object]) -> str:
    """Return the likeliest reply to a conversation."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"].strip()


def final_answer(text: str) -> str:
    """Return what `coe score` compares; vLLM's environment may lack what that needs."""
    return text.rsplit("####", 1)[-1].strip()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="Hugging Face folder")
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with `messages`")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    return parser.parse_args()


if __name__ == "__main__":
    main()
