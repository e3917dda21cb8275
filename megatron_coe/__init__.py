"""Chain-of-Experts as a Megatron-Core model provider."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_coe.distributed.single_process import single_process as single_process
    from megatron_coe.model.config import CoEConfig as CoEConfig
    from megatron_coe.model.provider import CoEModelProvider as CoEModelProvider

__version__ = "0.2.0"

# Megatron-Core imports torch's builder of C++ extensions, which warns on every machine with a CUDA
# toolkit and no GPU, such as a login node.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

_LAZY = {
    "CoEConfig": "megatron_coe.model.config",
    "CoEModelProvider": "megatron_coe.model.provider",
    "single_process": "megatron_coe.distributed.single_process",
}
"""Names of this package and where they are defined: imported when asked for, since they import
torch and Megatron, which takes seconds (PEP 562)."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
