"""The comparison of test outcomes under the two lines: what differs must be listed, and no more."""

from __future__ import annotations

from tests.engine_lines import compare, listed_differences

A, B, ELSEWHERE = "tests/a.py::test_one[x-1]", "tests/a.py::test_two", "tests/b.py::test_three"


def faults(old: dict[str, str], new: dict[str, str], listed: str = "") -> list[str]:
    return compare({"0.16": old, "0.19": new}, list(listed_differences(listed)))


def test_equal_sets_pass():
    assert faults({A: "passed", B: "skipped"}, {A: "passed", B: "skipped"}) == []


def test_a_difference_must_be_listed():
    old, new = {A: "passed", B: "passed"}, {A: "passed", B: "skipped"}
    assert faults(old, new) == [f"passes under 0.16 only (0.19: skipped): {B}"]
    assert faults(new, old) == [f"passes under 0.19 only (0.16: skipped): {B}"]
    assert faults(old, new, f"# why\n0.16 {B}") == []
    assert faults(old, new, f"0.19 {B}")[0].startswith("passes under 0.16 only")


def test_a_test_that_is_not_there_differs():
    assert faults({A: "passed", B: "passed"}, {B: "passed"}) == [
        f"passes under 0.16 only (0.19: not there): {A}"
    ]


def test_brackets_stand_for_themselves_and_a_star_for_any_parameters():
    old, new = {A: "passed", B: "passed"}, {A: "failed", B: "passed"}
    assert faults(old, new, f"0.16 {A}") == []
    assert faults(old, new, "0.16 tests/a.py::test_one*") == []
    assert faults(old, new, "0.16 tests/a.py::test_one[y*]") != []


def test_an_entry_without_a_difference_is_a_fault():
    same = {A: "passed"}
    assert faults(same, same, f"0.16 {A}") == [f"listed, but no difference: 0.16 {A}"]


def test_files_of_one_line_alone_do_not_count():
    assert faults({A: "passed", ELSEWHERE: "passed"}, {A: "passed"}) == []
    assert faults({A: "passed", ELSEWHERE: "passed"}, {A: "passed"}, f"0.16 {ELSEWHERE}") == []
