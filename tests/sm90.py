"""Compile Triton kernels for an H100 on a machine without a GPU, as their launches would."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

MOST_SHARED = 227 * 1024
"""Bytes of shared memory that a program can have on compute capability 9.0."""
MOST_REGISTERS = 64 * 1024
"""Registers of a multiprocessor."""


@dataclass(frozen=True)
class Launch:
    """A kernel as it was compiled for a launch."""

    name: str
    grid: tuple[int, ...]
    num_warps: int
    shared: int
    """Bytes of shared memory of a program."""
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread's stack: of registers that there were too few of."""
    instructions: str
    """PTX."""


class _NoDevice:
    """A driver of a device that is not here: enough of one to compile for it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def compiled_launches() -> Iterator[list[Launch]]:
    """Compile what the body launches, on tensors of the device `meta`, instead of running it."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def launch(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **meta: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **meta)
        launches.append(_launch_of(self.fn.__name__, grid, kernel))

    run = JITFunction.run
    with (
        mock.patch.object(driver, "_active", _NoDevice()),
        mock.patch.object(JITFunction, "run", launch),
    ):
        yield launches


def _launch_of(name: str, grid: tuple[int, ...], kernel: Any) -> Launch:
    usage = _resource_usage(kernel.asm["cubin"])
    return Launch(
        name=name,
        grid=grid,
        num_warps=kernel.metadata.num_warps,
        shared=kernel.metadata.shared,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        instructions=kernel.asm["ptx"],
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
