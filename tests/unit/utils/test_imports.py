"""Imports without garbage collections."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from megatron_coe.utils.imports import collected_later

_PROGRAM = """
import gc
from megatron_coe.utils.imports import collected_later
with collected_later():
    assert not gc.isenabled()
    kept = [[] for _ in range(1000)]
assert gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > 1000
try:
    with collected_later():
        raise ImportError
except ImportError:
    assert gc.isenabled()
print(gc.get_freeze_count() - frozen)
"""


def test_what_is_imported_is_frozen_and_collections_go_on():
    """A failed import freezes nothing."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_nothing_is_frozen_once_megatron_is_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "megatron.core", sys)
    before = gc.get_freeze_count()
    with collected_later():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
