"""Check the words of identifiers and docstrings.

    python tests/lint/words.py [FILE ...]    all Python files of the repository if none is named

A word that the field has a better one for is refused, and so is the summary line of a public
function that does not begin with a verb in the imperative. Exit status 1 if there is any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
AS_WRITTEN = "tests/data/"  # by earlier commits

BANNED = {
    r"trainees?": "train state",
    r"gauges?": "metrics",
    r"step figures?": "step metrics",
    r"savers?": "checkpointer",
    r"heed(s|ed|ing)?": "raise if stopped",
    r"befall(s|en)?|befell": "happen",
    r"anew": "again",
    r"mend(s|ed|ing)?": "fix, patch",
    r"(?<!line )endings": "exceptions",
    r"tall(y|ies|ied|ying)": "routing statistics, count",
    r"tickets?": "completion token",
    r"vet(s|ted|ting)?": "check, safe_unpickle",
    r"remade": "recomputed",
    r"synchronisations?": "synchronization",
    r"mixtures?(?![- ]of[- ]experts)": "MoE",
    r"arms?": "variant",
    r"(?:an?|the|its|this|each|every|no|of|these|those) covers?": "patch",
}
"""Words in lower case, as regular expressions, and what to say instead."""

BANNED_NAMES = {
    "MISTAKE": "CONFIG_ERROR",
    "RANK_LOST": "RANK_FAILURE",
    "covers": "patches",
    "point_at": "update_latest",
}

VERBS = frozenset(
    """
    add allow announce apply ask assert attach attend bound bring broadcast build call check
    choose clean clear clip close collect combine compare compile complete compute continue
    convert copy correct count create cut decide delete describe diagnose dispatch do draw drop
    encode end enter estimate evaluate exit explain export extend fill find finish fit flush
    forward free freeze fsync gather generate get give group guess hand hash have hold ignore import
    initialize insert install iterate join judge keep leave let limit list load log look make
    map mark match measure merge move multiply name normalize note notice open pack parse patch
    permute pick place plan plot prepare preprocess print profile prune publish put raise rank
    read rebuild receive record reduce refuse register release remove rename render replace
    report rerun reset resolve restore resume return round route run sample save say scale scan
    score search seed select send serve set shard share show shuffle skip sort split start state
    stop store subtract sum summarize sync tabulate take tell test time tokenize trace train
    translate truncate try turn unblock undo unpack unpickle upcycle update use validate verify
    wait warn watch weigh weight wrap write yield
    """.split()  # noqa: SIM905
)


def main(arguments: list[str]) -> int:
    """Print what is wrong in the files, and return how the process should exit."""
    complaints = [
        f"{path}:{line}: {complaint}"
        for path in map(Path, arguments or sources())
        for line, complaint in complaints_about(path.read_text(encoding="utf-8"), is_test(path))
    ]
    print("\n".join(complaints) or "No banned words, and every summary is imperative.")
    return 1 if complaints else 0


def sources() -> Iterator[Path]:
    """Yield the Python files of the repository."""
    for path in sorted(REPOSITORY.rglob("*.py")):
        name = path.relative_to(REPOSITORY).as_posix()
        if not name.startswith((".", "build/", "runs/", AS_WRITTEN)):
            yield path


def is_test(path: Path) -> bool:
    """Return whether a file holds tests, whose names say what is true instead of what to do."""
    return path.resolve().is_relative_to(REPOSITORY / "tests")


def complaints_about(source: str, of_tests: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the line and the fault of each identifier and docstring of a module."""
    tree = ast.parse(source)
    for line, name in names(tree):
        for word, better in banned_in_name(name):
            yield line, f"{word!r} in the name {name}: say {better}"
    for line, text in texts(tree):
        for word, better in banned_in_text(text):
            yield line, f"{word!r} in a docstring: say {better}"
    for function in () if of_tests else public_functions(tree):
        summary = ast.get_docstring(function)
        if summary and summary.split()[0].rstrip(",;:").lower() not in VERBS:
            line = function.body[0].lineno
            yield line, f"the summary of {function.name} begins with none of this checker's verbs"


def banned_in_text(text: str) -> Iterator[tuple[str, str]]:
    """Yield each banned word of a text, those of names in it included, and what to say instead."""
    for name in re.findall(r"\w*[A-Za-z0-9](?:_|(?<=[a-z])[A-Z])\w*", text):
        yield from banned_in_name(name)
    for pattern, better in BANNED.items():
        for match in re.finditer(rf"\b(?:{pattern})\b", text.lower()):
            yield match[0], better


def banned_in_name(name: str) -> Iterator[tuple[str, str]]:
    """Yield each banned word of an identifier, and what to say instead."""
    if name in BANNED_NAMES:
        yield name, BANNED_NAMES[name]
    for pattern, better in BANNED.items():
        for match in re.finditer(rf"\b(?:{pattern})\b", words_of(name)):
            yield match[0], better


def words_of(name: str) -> str:
    """Return an identifier's words in lower case: `read step` of `read_step` and `ReadStep`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name).lower().strip()


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the identifier of everything that a module names (of others', none)."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name) | ast.arg(arg=name) | ast.alias(asname=str(name)):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield node.lineno, name
            case ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring, those under variables and fields included."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def public_functions(
    tree: ast.Module | ast.ClassDef,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions and methods that others call; a property is no function to them."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if not node.name.startswith("_") and not re.search(r"property|\.setter", decorators):
                yield node


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
