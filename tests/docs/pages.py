"""Pages of the documentation as they are written: blocks, commands, marks, links, anchors.

A command stands in a block, indented or fenced. A comment under the block, which readers do not
see, is its mark:

    <!-- Run by tests/functional/test_convert.py -->     a test launches it, on smaller data
    <!-- Run as it stands by the docs test -->           word for word, by test_docs.py
    <!-- Not run by a test: needs a GPU -->              and why
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LAUNCHERS = {"python", "python3", "torchrun", "make", "pytest", "sbatch", "pip", "bash", "lm_eval"}
LAUNCHERS |= {"coe", "tensorboard", "apptainer"}
SHELL = {"for", "done", "export", "cd", "mkdir"}
"""What may stand between commands of a fenced block of shell."""

LITERALLY = "Run as it stands by the docs test"
PRINTS = ", which compares what it prints"
_RUN_BY = re.compile(r"Run by ((?:tests/[\w/]+\.py(?:, )?)+)(?: \((\w+)\))?(?:: .+)?")
_NOT_RUN = re.compile(r"Not run by a test: (\w+ .+)")
_COMMENT = re.compile(r"<!-- (.*) -->")
_ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=")
_FENCE = re.compile(r"^```(\w*)\s*$")
_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """Lines that are shown as they are."""

    page: Path
    line: int
    """Of its first line, counted from 1."""
    language: str
    """What a fence says; empty for a plain fence and for an indented block."""
    text: str
    comment: str
    """Of the line under it, where that is one."""


@dataclass(frozen=True)
class Command:
    """A command line, without variables that are set for it."""

    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words[:4])}"


@dataclass(frozen=True)
class Mark:
    """What the comment under a command says."""

    tests: tuple[Path, ...] = ()
    marker: str = ""
    """Of pytest, where the tests are not among the fast ones."""
    literally: bool = False
    prints: bool = False
    reason: str = ""


def pages_of(root: Path) -> list[Path]:
    """All pages, relative to the repository `root`."""
    named = [root / name for name in ("README.md", "CONTRIBUTING.md", "slurm/README.md")]
    return [path.relative_to(root) for path in [*named, *sorted(root.glob("docs/*.md"))]]


def blocks_of(page: Path, text: str) -> Iterator[Block]:
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence:
            begin, end = number + 1, _fence_end(lines, number + 1)
            content, after = lines[begin:end], end + 1
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            begin, after = number, _indented_end(lines, number)
            content = [line[4:] for line in lines[begin:after]]
        else:
            number += 1
            continue
        language = fence[1] if fence else ""
        under = next((line for line in lines[after:] if line.strip()), "")
        comment = _COMMENT.fullmatch(under.strip())
        yield Block(page, begin + 1, language, "\n".join(content), comment[1] if comment else "")
        number = after


def _fence_end(lines: list[str], number: int) -> int:
    while number < len(lines) and not lines[number].startswith("```"):
        number += 1
    return number


def _indented_end(lines: list[str], number: int) -> int:
    end = number
    while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
        number += 1
        if lines[number - 1].strip():
            end = number
    return end


def commands_of(block: Block) -> Iterator[Command]:
    """Commands of a block: every line of a block of shell, of a plain one what begins as one."""
    is_shell = block.language in ("bash", "sh")
    if block.language and not is_shell:
        return
    for line, text in _logical_lines(block):
        start = text.split(maxsplit=1)[0] if text.strip() else ""
        if not (is_shell or start in LAUNCHERS or _ASSIGNMENT.match(start)):
            continue
        words = shlex.split(text, comments=True)
        while words and _ASSIGNMENT.match(words[0]):
            words = words[1:]
        if not words or words[0] in SHELL:
            continue
        if is_shell or words[0] in LAUNCHERS or words[0].endswith(".sh"):
            yield Command(block.page, line, tuple(words))


def _logical_lines(block: Block) -> Iterator[tuple[int, str]]:
    """Lines with those that a backslash continues, and the number of the first."""
    begin, joined = block.line, ""
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        joined, begin = (joined + line, begin) if joined else (line, number)
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
            continue
        yield begin, joined
        joined = ""


def inline_commands(page: Path, text: str) -> Iterator[Command]:
    """Commands that a sentence names in passing: `make test`. A program alone is none."""
    prose = text
    for block in blocks_of(page, text):  # line numbers stay
        prose = prose.replace(block.text, "\n" * block.text.count("\n"), 1)
    for number, line in enumerate(prose.splitlines(), start=1):
        for code in _CODE.findall(line):
            words = tuple(code.split())
            if words[0] in LAUNCHERS and len(words) > (1 if words[0] == "make" else 2):
                yield Command(page, number, tuple(shlex.split(code)))


def mark_of(block: Block) -> Mark | None:
    """The mark of a block's commands; None where there is none that is well-formed."""
    text = block.comment
    if text in (LITERALLY, LITERALLY + PRINTS):
        return Mark(literally=True, prints=text.endswith(PRINTS))
    if found := _RUN_BY.fullmatch(text):
        return Mark(tests=tuple(map(Path, found[1].split(", "))), marker=found[2] or "")
    if found := _NOT_RUN.fullmatch(text):
        return Mark(reason=found[1])
    return None


def broken_links(root: Path, page: Path) -> list[str]:
    """Links of a page to files that are not there, or to anchors that no heading makes."""
    complaints = []
    text = _without_blocks((root / page).read_text(encoding="utf-8"))
    for number, line in enumerate(text.splitlines(), start=1):
        for pair in _LINK.findall(line):
            target = pair[0] or pair[1]
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            path = (root / page).parent / name if name else root / page
            if not path.exists():
                complaints.append(f"{page}:{number}: links to {target}: no such file")
            elif anchor and anchor not in anchors_of(path.read_text(encoding="utf-8")):
                complaints.append(f"{page}:{number}: links to {target}: no such heading")
    return complaints


def anchors_of(text: str) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", _without_blocks(text), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


def _without_blocks(text: str) -> str:
    """The page without its fenced blocks; lines keep their numbers."""
    kept, inside = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        kept.append("" if inside or fence else line)
        inside ^= fence
    return "\n".join(kept)
