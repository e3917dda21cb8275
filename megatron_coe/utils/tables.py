"""Tables as text: in Markdown, or aligned for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def aligned_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with its columns aligned to the right; a first column of words to the left."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    is_numbered = len(lines) > 1 and lines[1][0].isdigit()
    text = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        first = first.rjust(widths[0]) if is_numbered else first.ljust(widths[0])
        text.append("  " + "  ".join([first, *cells]).rstrip())
    return "\n".join(text)
