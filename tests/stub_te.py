"""Packages called `transformer_engine` for a path: one that needs a GPU, and broken ones."""

from __future__ import annotations

from pathlib import Path

NEEDS_A_GPU = '''
"""Every name of every submodule is there, and refuses to be called or built without a GPU."""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "2.20.2"


class _Refusing(type):
    def __call__(cls, *args, **kwargs):
        raise RuntimeError(f"{cls.__module__}.{cls.__name__} was called: no NVIDIA driver")

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _refusing(f"{cls.__name__}.{name}", cls.__module__)


def _refusing(name, module):
    return _Refusing(name, (), {"__module__": module})


class _Submodule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name.lstrip("_")[0].isupper():
            return _refusing(name, self.__name__)

        def call(*args, **kwargs):
            raise RuntimeError(f"{self.__name__}.{name} was called: no NVIDIA driver")

        call.__name__, call.__module__ = name, self.__name__
        return call


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.startswith(__name__ + "."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Submodule(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())
import transformer_engine.common.recipe
import transformer_engine.pytorch.ops
'''

BROKEN = {
    "AssertionError": {"__init__": "assert False, 'TE and\\ntorch do not fit'"},
    "ImportError": {"__init__": "raise ImportError('undefined symbol: cublasLtCreate')"},
    "RuntimeError": {"__init__": "raise RuntimeError('found two libraries')"},
    "OSError": {"__init__": "raise OSError('libcudart.so.13: cannot open shared object file')"},
    "a part that is missing": {"__init__": "__version__ = '2.20.2'"},
    "a part that raises": {
        "__init__": "__version__ = '2.20.2'",
        "pytorch": "import something_that_is_not_installed",
    },
}
"""Files of packages whose import fails, and Megatron-Core's with them."""


def write_te(folder: Path, **files: str) -> Path:
    """A package of these modules in `folder`, which is returned."""
    package = folder / "transformer_engine"
    package.mkdir(parents=True)
    for name, text in files.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    return folder
