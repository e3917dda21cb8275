"""Detect whether Transformer Engine is installed, complete and usable on this machine.

absent    `import transformer_engine` raises ImportError: Megatron-Core does without it, too
broken    that, or the import of its PyTorch part, raises anything else: Megatron-Core, which
          imports it wherever it is found, cannot be imported either
unusable  it is complete, but there is no CUDA device
usable    complete, with a CUDA device
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import traceback

PACKAGE = "transformer_engine"


class BrokenTransformerEngineError(ValueError):
    """Transformer Engine is installed, and importing it fails; the message is one line."""

    def __init__(self, error: BaseException) -> None:
        spec = importlib.util.find_spec(PACKAGE)
        folders = list(spec.submodule_search_locations or []) if spec else []
        reason = " ".join(str(error).split())
        super().__init__(
            f"Transformer Engine ({folders[0] if folders else PACKAGE}) is installed but cannot be "
            f"imported, nor can Megatron-Core beside it: {type(error).__name__}: {reason}. Install "
            "one that fits this PyTorch, or remove it (`pip uninstall transformer-engine`): "
            "PyTorch's modules then stand in"
        )


def have_te() -> bool:
    """Return whether Transformer Engine can be used: complete, and with a CUDA device.

    Raises:
        BrokenTransformerEngineError: it is broken.
    """
    import torch

    return is_installed() and torch.cuda.is_available()


def is_installed() -> bool:
    """Return whether Transformer Engine can be imported, usable or not. Raises as `have_te`."""
    return import_error() is None


@functools.cache
def import_error() -> ModuleNotFoundError | None:
    """Return why Transformer Engine is absent; None if it is not. Raises as `have_te` does."""
    if importlib.util.find_spec(PACKAGE) is None:
        return ModuleNotFoundError(f"no package {PACKAGE} is installed", name=PACKAGE)
    import torch  # noqa: F401  # whose libraries its extension needs

    try:
        importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        return error
    except Exception as error:
        raise BrokenTransformerEngineError(error) from error
    try:
        importlib.import_module(f"{PACKAGE}.pytorch")
    except Exception as error:
        raise BrokenTransformerEngineError(error) from error
    return None


def broken_by(error: BaseException | None) -> BrokenTransformerEngineError | None:
    """Return the error for an exception that an import of Transformer Engine raised, else None.

    Commands import Megatron-Core, and it with Transformer Engine, only when they need it: they ask
    afterwards what went wrong, instead of importing both beforehand.
    """
    while error is not None:
        if isinstance(error, BrokenTransformerEngineError):
            return error
        if _missing_part(error) or _raised_by_import(error):
            return BrokenTransformerEngineError(error)
        error = error.__cause__
    return None


def _missing_part(error: BaseException) -> bool:
    """Return whether a part of the package, or of what pip knows of it, is missing."""
    name = (isinstance(error, ImportError) and error.name) or ""
    is_part = name.replace("-", "_").partition(".")[0] == PACKAGE
    return is_part and importlib.util.find_spec(PACKAGE) is not None


def _raised_by_import(error: BaseException) -> bool:
    return any(
        frame.f_code.co_name == "<module>"
        and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
