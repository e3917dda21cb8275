"""Modules as patches see them: anything may be read from them and written into them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any


def load_module(name: str) -> Any:
    """Import a module whose names are to be replaced, or return it if it is there."""
    return importlib.import_module(name)


def loaded_modules(package: str) -> Iterator[Any]:
    """Yield the modules of a package that have been imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith(package) and module is not None:
            yield module


def rebind(original: object, replacement: object) -> None:
    """Replace `original` under every name that a module of Megatron-Core has imported it by."""
    for module in loaded_modules("megatron.core"):
        for name, value in list(vars(module).items()):
            if value is original:
                setattr(module, name, replacement)
