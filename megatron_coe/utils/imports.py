"""Imports of optional and noisy packages, for commands that answer in one line."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_INSTALLED_AS = {"google": "protobuf", "megatron": "megatron-core", "yaml": "pyyaml"}
"""Modules whose package has another name."""


def missing_package(error: BaseException) -> ValueError | None:
    """Explain an import that lacks a package; None for any other error."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    module = (error.name or "").partition(".")[0]
    if module == "megatron_coe":  # a mistake of ours
        return None
    if not module:  # a library's own words
        return ValueError(" ".join(str(error).split()))
    package = _INSTALLED_AS.get(module, module.replace("_", "-"))
    return ValueError(
        f"the package {package} is not installed for {sys.executable}: `pip install {package}`, or "
        "in the repository `pip install -e '.[data,hf,plot]'` for all that commands need "
        "(docs/installation.md)"
    )


@contextmanager
def collected_later() -> Iterator[None]:
    """Import Megatron in the body without garbage collections, and leave its objects out of later.

    Its import makes half a million objects, all of which stay: looking through them again and again
    is a third of the time that it takes. A process that has imported it does nothing here, as
    freezing would keep what is garbage by now.
    """
    if "megatron.core" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def quiet_imports() -> None:
    """Let Megatron-Core be imported without its warnings about what this package does not use."""
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
    warnings.filterwarnings("ignore", message="MimoModelConfig is experimental")


def quiet_megatron() -> None:
    """Ignore all warnings of Megatron's modules, for commands that train nothing."""
    warnings.filterwarnings("ignore", module="megatron.*")
