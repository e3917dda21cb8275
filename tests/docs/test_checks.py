"""Can the documentation's checks fail? Faults planted in pages, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.commands import faults_of, faults_of_mark
from tests.docs.pages import (
    Block,
    Mark,
    anchors_of,
    blocks_of,
    broken_links,
    commands_of,
    inline_commands,
    mark_of,
    pages_of,
)

REPO = Path(__file__).parents[2]
PAGE = Path("docs/page.md")
TEST = Path("tests/functional/test_tool.py")

TOOL = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--load", required=True)
parser.add_argument("--count", type=int)
parser.parse_args()
raise RuntimeError("a parser is asked, and no more")
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a tool, a Makefile and a test."""
    files = {
        "tools/tool.py": TOOL,
        "Makefile": "JOBS ?= 2\nall test: .done\n\ttrue\n",
        "pyproject.toml": "[project.optional-dependencies]\neval = []\n",
        str(TEST): "",
        "README.md": "# Start here\n\n## What `it` is: a test\n\n## Twice\n\n## Twice\n",
        "CONTRIBUTING.md": "",
        "slurm/README.md": "",
        str(PAGE): "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def block(text: str, comment: str = "", language: str = "bash") -> Block:
    return Block(PAGE, 1, language, text, comment)


# --- reading pages ----------------------------------------------------------------------------

TEXT = """# A page

    python tools/tool.py --load a \\
        --count 3      # a remark
    A=1 B='x y' make test

<!-- Run by tests/functional/test_tool.py -->

- a list
    with a line that is no block: python nothing.py

```bash
for x in a b; do
    python tools/tool.py --load $x
done
export A=1
```

```
python of-an-output is a command too
numbers 1 2 3
```

```python
python = "no command"
```
Say `make test` or `python tools/tool.py --load x`, or `python -O` or `make`.
"""


def test_blocks_commands_and_comments_are_found():
    blocks = list(blocks_of(PAGE, TEXT))
    assert [(b.line, b.language, bool(b.comment)) for b in blocks] == [
        (3, "", True),
        (13, "bash", False),
        (20, "", False),
        (25, "python", False),
    ]
    commands = [(c.line, c.words) for b in blocks for c in commands_of(b)]
    assert commands == [
        (3, ("python", "tools/tool.py", "--load", "a", "--count", "3")),
        (5, ("make", "test")),
        (14, ("python", "tools/tool.py", "--load", "$x")),
        (20, ("python", "of-an-output", "is", "a", "command", "too")),
    ]
    inline = [(c.line, c.words[0]) for c in inline_commands(PAGE, TEXT)]
    assert inline == [(27, "make"), (27, "python")]


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("Run by tests/a.py", Mark(tests=(Path("tests/a.py"),))),
        (
            "Run by tests/a.py, tests/b/c.py (slow): smaller",
            Mark(tests=(Path("tests/a.py"), Path("tests/b/c.py")), marker="slow"),
        ),
        ("Run as it stands by the docs test", Mark(literally=True)),
        (
            "Run as it stands by the docs test, which compares what it prints",
            Mark(literally=True, prints=True),
        ),
        ("Not run by a test: needs a GPU", Mark(reason="needs a GPU")),
        ("Not run by a test", None),
        ("Not run by a test: ", None),
        ("Run by nobody", None),
        ("", None),
    ],
)
def test_marks_are_read(text, mark):
    assert mark_of(block("make test", text)) == mark


# --- commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("python tools/tool.py --load a --count 3", None),
        ("python tools/tool.py --lode a", "--load"),
        ("python tools/tool.py --load a --counts 3", "--counts"),
        ("python tools/tool.py --load a --count three", "--count"),
        ("python tools/tool.py", "--load"),
        ("torchrun --nproc-per-node 2 tools/tool.py --load a", None),
        ("torchrun --nproc-per-rank 2 tools/tool.py --load a", "torchrun"),
        ("torchrun --nproc-per-node 2 tools/tool.py --laod a", "--load"),
        ("python tools/gone.py --load a", "there is no tools/gone.py"),
        ("coe verify --input a", None),
        ("coe verify --inputs a", "--inputs"),
        ("coe check --input a", "check"),
        ("python tools/tool.py --load examples/gone.yaml", "there is no examples/gone.yaml"),
        ("make all test JOBS=3", None),
        ("make tests", "the Makefile has no tests"),
        ("make test JOB=3", "the Makefile has no JOB"),
        ('pip install -e ".[eval]"', None),
        ('pip install -e ".[evil]"', "pyproject.toml has no extra evil"),
        ("pythn tools/tool.py --load a", "pythn is no program that is known"),
    ],
)
def test_a_wrong_command_is_told(root, text, told):
    faults = faults_of(root, commands_of(block(text)))
    assert len(faults) == (told is not None)
    assert told is None or told in faults[0]


def test_a_mark_that_names_no_test_is_told(root):
    assert faults_of_mark(root, Mark(tests=(TEST,))) == []
    assert faults_of_mark(root, Mark(tests=(Path("tests/gone.py"),))) == [
        "no such file: tests/gone.py"
    ]


# --- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[a](../README.md) [b](../README.md#what-it-is-a-test) [c](https://x.y/z#w)", None),
        ("[a](../README.md#twice-1) ![p](../Makefile)\n```\n[x](gone.md)\n```", None),
        ("# Here\n[a](#here)", None),
        ("[a](gone.md)", "links to gone.md: no such file"),
        ("![a](gone.png)", "links to gone.png: no such file"),
        ("[a](../README.md#what-is-it)", "links to ../README.md#what-is-it: no such heading"),
        ("[a](../README.md#twice-2)", "no such heading"),
        ("[a](#gone)", "links to #gone: no such heading"),
    ],
)
def test_a_dead_link_is_told(root, text, told):
    (root / PAGE).write_text(text)
    faults = broken_links(root, PAGE)
    assert len(faults) == (told is not None)
    assert told is None or told in faults[0]


def test_anchors_are_those_of_github():
    headings = "# A `b-c` (d)\n## E: f, g\n## [H](i.md)\n## A_b\n## x(0) → y\n"
    assert anchors_of(headings) == {"a-b-c-d", "e-f-g", "h", "a_b", "x0--y"}


def test_every_page_of_the_repository_is_looked_at():
    pages = {str(page) for page in pages_of(REPO)}
    assert {"README.md", "CONTRIBUTING.md", "slurm/README.md", "docs/concepts.md"} < pages
