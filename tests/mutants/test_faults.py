"""The planted faults themselves: all can be planted in today's source, and have tests."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.faults import FAULTS, Fault
from tests.mutants.run import select, shard_of

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_stands_in_one_place_and_changes_it(fault: Fault):
    assert (REPO / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old
    assert all((REPO / test.partition("::")[0]).exists() for test in fault.tests)


def test_names_are_of_one_fault_each():
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1


def test_shards_are_all_faults_once():
    shards = [select([], shard_of(f"{index}/4")) for index in range(1, 5)]
    assert sorted(f.name for shard in shards for f in shard) == sorted(f.name for f in FAULTS)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0"])
def test_a_shard_that_cannot_be_is_refused(text: str):
    with pytest.raises(ArgumentTypeError, match="such as 1/4"):
        shard_of(text)
