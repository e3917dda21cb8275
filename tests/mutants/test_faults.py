"""The planted faults themselves: all can be planted in today's source, and have tests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.faults import FAULTS, Fault

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_stands_in_one_place_and_changes_it(fault: Fault):
    assert (REPO / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old
    assert all((REPO / test.partition("::")[0]).exists() for test in fault.tests)


def test_names_are_of_one_fault_each():
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1
