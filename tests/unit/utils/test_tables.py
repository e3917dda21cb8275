"""Tables as text."""

from __future__ import annotations

from megatron_coe.utils.tables import aligned_table, markdown_table


def test_markdown():
    table = markdown_table(["model", "loss"], [["moe", "1.5"], ["coe", ""]])
    assert table == "| model | loss |\n| --- | --- |\n| moe | 1.5 |\n| coe |  |"


def test_numbers_stand_to_the_right_and_words_to_the_left():
    assert aligned_table(["name", "ms"], [["all-to-all", "10.5"], ["send", "2"]]) == (
        "  name          ms\n  all-to-all  10.5\n  send           2"
    )
    assert aligned_table(["rank", "ms", ""], [["0", "1", "equal"], ["10", "22", ""]]) == (
        "  rank  ms\n     0   1  equal\n    10  22"
    )
