"""Command lines and ranks without the seconds that importing Megatron takes.

A zygote is a process that has imported everything once and started nothing: no thread, no process
group. For each run it forks a child, which then is that run: it executes the script's file as
`__main__`, has its pid, its process group, its files and its environment, dies of signals and ends
with a status, all as if a shell had started it (tests/functional/test_faults.py compares them).
What happens while modules are imported is not of the run: a test of that, or of the variables that
libraries read then, starts a process of its own.

    done = run("tools/generate.py", "--model", "hf", cwd=folder)      like subprocess.run

    with Zygote(REPO) as zygote:
        process = zygote.start("pretrain_coe.py", ["--config", "run.yaml"], folder, environment)
        status = process.wait(60)

Requests go to the zygote and replies come back as lines of JSON. It ends when the pipe ends, so
however the harness ends, and takes all process groups that it started with it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import TracebackType

REPO = Path(__file__).resolve().parents[1]

# All that a run imports, also late: what is missing here only takes longer.
IMPORTS = (
    "megatron_coe.training.build",
    "megatron_coe.conversion.export_hf",
    "megatron_coe.conversion.import_hf",
    "megatron_coe.generation",
    "matplotlib.pyplot",
    "megatron_coe.config.validation",
    "megatron_coe.data.tokenizer",
    "torch.utils.tensorboard",
    "sentencepiece",
    "multiprocessing.managers",
)
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.02


class Process:
    """A run, with a process group of its own for everything that it starts itself.

    Args:
        ask: gives the exit status, once the process has ended; None until then.
        out, err: what it prints.
    """

    def __init__(self, pid: int, ask: Callable[[], int | None], out: Path, err: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ask = ask
        self.out, self.err = out, err

    def poll(self) -> int | None:
        """The exit status as `subprocess` gives it (-9 for SIGKILL); None while it runs.

        Until this has seen the end, the pid is nobody else's, so signals cannot go astray.
        """
        if self.returncode is None:
            self.returncode = self._ask()
        return self.returncode

    def wait(self, timeout_s: float) -> int | None:
        """Like `poll`, after at most `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        return self.returncode

    def send(self, number: int) -> bool:
        """Signal the process itself; whether it was still there."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def end(self) -> None:
        """Kill whatever is left of its process group."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(10)

    def said(self) -> str:
        return self.out.read_text(errors="replace")

    def complained(self) -> str:
        return self.err.read_text(errors="replace")


class Zygote:
    """The harness's end.

    Args:
        tree: a checkout of this repository, whose modules are imported.
        environment: additional variables for the interpreter, such as PYTHONOPTIMIZE.
        imports: the modules to import.
    """

    def __init__(
        self,
        tree: Path,
        environment: Mapping[str, str] | None = None,
        imports: Sequence[str] = IMPORTS,
    ) -> None:
        self._tree = tree
        # Threads that libraries start while they are imported would not survive a fork.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(tree), *imports],
            cwd=tree,
            env={
                **os.environ,
                **threads,
                **{"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"},
                **(environment or {}),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the harness
        )

    @property
    def pid(self) -> int:
        return self._server.pid

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)

    def start(
        self,
        script: str | Path,
        arguments: Sequence[object],
        files: Path,
        environment: Mapping[str, str],
        plant: str | None = None,
        cwd: Path | None = None,
    ) -> Process:
        """Run `script` (relative to the tree) in the folder `cwd`, or in the tree's root.

        Args:
            files: folder for what it prints; `out` and `err` of the rank are made again.
            environment: all of it.
            plant: `module:function` to call in the new process before the script: a fault.
        """
        rank = environment.get("RANK", "0")
        out, err = files / f"out{rank}", files / f"err{rank}"
        pid = self.ask(
            start={
                "argv": [str(self._tree / script), *map(str, arguments)],
                "cwd": str(cwd or self._tree),
                "env": dict(environment),
                "out": str(out),
                "err": str(err),
                "plant": plant,
            }
        )
        assert pid is not None
        return Process(pid, partial(self.ask, poll=pid), out, err)

    def ask(self, **request: object) -> int | None:
        server = self._server
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        reply = server.stdout.readline()
        if not reply:
            raise RuntimeError(f"the zygote has ended with status {server.wait()}")
        return json.loads(reply)


@cache
def shared() -> Zygote:
    """The one that all tests of this process use; it ends with this process."""
    # Read when the Hugging Face libraries are imported: no fork can have others.
    home = tempfile.TemporaryDirectory(prefix="megatron_coe-hf-")
    zygote = Zygote(REPO, {"HF_HOME": home.name, "HF_HUB_OFFLINE": "1"})
    atexit.register(home.cleanup)
    atexit.register(zygote.__exit__, None, None, None)
    return zygote


def run(
    script: str | Path,
    *arguments: object,
    cwd: Path = REPO,
    environment: Mapping[str, str] | None = None,
    forked: bool = True,
    timeout_s: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Run a script of this repository (relative to its root) to its end, without input.

    Args:
        environment: what it has beside the variables of this process.
        forked: False: start an interpreter, as a shell would; every command line has a test that
            does so.
    """
    own = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    variables = {**os.environ, **own, **(environment or {})}
    if not forked:
        return subprocess.run(
            [sys.executable, str(REPO / script), *map(str, arguments)],
            cwd=cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    with tempfile.TemporaryDirectory() as files:
        process = shared().start(script, arguments, Path(files), variables, cwd=cwd)
        status = process.wait(timeout_s)
        process.end()
        if status is None:
            raise subprocess.TimeoutExpired([str(script), *map(str, arguments)], timeout_s)
        said, complained = process.said(), process.complained()
    return subprocess.CompletedProcess([script, *arguments], status, said, complained)


# --- the zygote's own side ---------------------------------------------------------------


def _serve() -> dict | None:
    """Answer requests until there are no more. A forked child returns: with what it has to be."""
    children: dict[int, int | None] = {}
    replies = os.dup(1)
    os.dup2(2, 1)
    for line in _lines():
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                os.close(replies)
                return request["start"]
            with contextlib.suppress(OSError):  # the child does the same: whoever is first
                os.setpgid(pid, pid)
            children[pid] = reply = pid
        else:
            reply = _poll(request["poll"])
        os.write(replies, (json.dumps(reply) + "\n").encode())
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def _lines():
    """Lines of standard input, unbuffered, so that no child inherits any."""
    pending = b""
    while chunk := os.read(0, 65536):
        *lines, pending = (pending + chunk).split(b"\n")
        yield from lines


def _poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _become(job: dict) -> None:
    """Make this fork the process that the shell's `python script …` would be."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for fd, path, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], flags),
        (2, job["err"], flags),
    ):
        opened = os.open(path, mode, 0o644)
        os.dup2(opened, fd)
        os.close(opened)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv[:] = job["argv"]
    # What each process finds out for itself, and modules have remembered.
    tempfile.tempdir = None
    random.seed()
    if job["plant"]:
        module, _, function = job["plant"].partition(":")
        getattr(importlib.import_module(module), function)()
    runpy.run_path(job["argv"][0], run_name="__main__")


def _leave(shared: Sequence[str]) -> None:
    """Let the interpreter take down what a run has made itself, and not the shared modules.

    Clearing those would copy the memory that all forks share, page by page, and take as long as a
    small run. C++ destructors of the libraries do the same, and are left out.
    """
    if not shared:
        return
    own = {"sys", "builtins"}
    kept = [sys.modules[name] for name in shared if name in sys.modules and name not in own]
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))  # for good
    sys.modules.update(dict.fromkeys(set(shared) - own))  # as the interpreter does
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)


def _main() -> None:
    sys.path[0:1] = [sys.argv[1], str(REPO)]  # the script's folder as ever, and that of plants
    shared: list[str] = []
    atexit.register(_leave, shared)  # the first to be registered is the last to be called
    gc.disable()  # of what is imported nothing is garbage
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()  # so that collections of garbage in a fork leave the shared memory alone
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "an import has started a thread, which no fork would have"
    job = _serve()
    if job is not None:
        shared += sys.modules
        _become(job)


if __name__ == "__main__":
    _main()
