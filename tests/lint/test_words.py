"""Every banned word is found wherever it is banned, and its decent neighbors are not."""

from __future__ import annotations

import pytest

from tests.lint import words


def complaints(source: str, of_tests: bool = False) -> list[str]:
    return [complaint for _, complaint in words.complaints_about(source, of_tests)]


BANNED = [
    *("trainee", "gauges", "StepFigures", "saver", "heeded", "befell", "anew", "mends", "mended"),
    *("endings", "tallies", "tickets", "vetted", "vet", "remade", "synchronisations", "mixture"),
    *("MISTAKE", "RANK_LOST", "arms", "point_at", "covers"),
]


@pytest.mark.parametrize(
    "source",
    [
        "def {}(): pass",
        "class {}: pass",
        "def f(x, *, {}=1): pass",
        "def f(*{}): pass",
        "{} = 1",
        "{}: int = 1",
        "for {}, x in y: pass",
        "x = [1 for {} in y]",
        "self.{} = 1",
        "import x as {}",
        "lambda {}: 1",
        "with x as {}: pass",
        "try: pass\nexcept OSError as {}: pass",
        "match x:\n    case [1, {}]: pass",
        "match x:\n    case [1, *{}]: pass",
    ],
)
def test_identifiers(source):
    for name in BANNED:
        assert complaints(source.format(name))
    assert not complaints(source.format("good"))


def test_words_of_longer_identifiers():
    for name in ("of_tickets", "TICKETS_OF_ALL", "take_ticket_2", "TicketOf", "aTicket", "_ticket"):
        assert complaints(f"{name} = 1")


@pytest.mark.parametrize(
    "source",
    [
        '"""{}"""',
        'class A:\n    """{}"""',
        'class A:\n    x: int = 1\n    """{}"""',
        'x = 1\n"""{}"""',
        'def _f():\n    """{}"""',
        'async def _f():\n    """{}"""',
    ],
)
def test_docstrings(source):
    for text in ("What befell it.", "A mended\nfile.", "Its covers.", "`take_ticket`, `AnewOf`."):
        assert complaints(source.format(text))
    assert not complaints(source.format("What happened to it."))


@pytest.mark.parametrize(
    "source",
    [
        "alarm = charms = farm = 1",
        "velvet = private = 1",
        "amend = recommend = commend = 1",
        "mistakes = covered = 1",
        '"""Mixture-of-experts layers; line endings; intervals that cover the truth."""',
        "x = 'the mixture'  # is no docstring",
        "other.mend(vet=1)",
        "import mixture",
    ],
)
def test_good_words(source):
    assert not complaints(source)


def test_summaries_of_public_functions_are_imperative():
    for summary in ("The size.", "What is there.", "Whether it is.", "Returns it.", "Args:\n"):
        for source in ("def f():\n    {}", "class A:\n    async def f(self):\n        {}"):
            source = source.format(f'"""{summary}"""')
            assert len(complaints(source)) == 1
            assert not complaints(source, of_tests=True)
            assert not complaints(source.replace("def f", "def _f"))
            assert not complaints(source.replace(summary, "Return, or raise."))
    for decorator in ("property", "functools.cached_property", "x.setter"):
        source = f'class A:\n    @{decorator}\n    def f(self):\n        """The size."""'
        assert not complaints(source)


def test_a_file_is_named_with_its_line_and_the_status_is_1(tmp_path, capsys):
    path = tmp_path / "module.py"
    path.write_text("good = 1\nanew = 2\n")
    assert words.main([str(path)]) == 1
    assert capsys.readouterr().out == f"{path}:2: 'anew' in the name anew: say again\n"
    path.write_text("good = 1\n")
    assert words.main([str(path)]) == 0


def test_the_repository_is_read():
    names = {path.relative_to(words.REPOSITORY).as_posix() for path in words.sources()}
    assert {"pretrain_coe.py", "tests/lint/words.py"} <= names
    assert not any(name.startswith("tests/data/") for name in names)
