"""What can be said about a documented command without running it, and about its mark.

The arguments of this repository's programs are read by the programs' own parsers, in a process of
its own (`tests.docs.parsers`): a renamed option makes the documentation wrong, and a test red.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.docs.pages import LAUNCHERS, Command, Mark

BATCH = {"pretrain.sbatch": "pretrain_coe.py", "convert.sbatch": "tools/convert_checkpoint.py"}
"""Batch scripts, and the programs that their own arguments go to."""

INSTALLED = ("torchrun", "coe")


@dataclass(frozen=True)
class Invocation:
    """A program of this repository, `coe` or torchrun, and its arguments."""

    program: str
    arguments: tuple[str, ...]


def invocation_of(root: Path, command: Command) -> Invocation | None:
    """The program whose parser can judge the command; None for programs of others."""
    launcher, *rest = command.words
    if launcher in ("python", "python3"):
        while rest and rest[0] in ("-O", "-u"):
            rest = rest[1:]
        if rest[:1] == ["-m"]:
            rest = [f"{rest[1].replace('.', '/')}.py", *rest[2:]]
            if not (root / rest[0]).exists():  # a module that is installed: pytest, venv
                return None
        return Invocation(rest[0], tuple(rest[1:])) if rest else None
    if launcher in INSTALLED:
        return Invocation(launcher, tuple(rest))
    if launcher == "sbatch":
        for number, word in enumerate(rest):
            if word.endswith(".sbatch"):
                program, own = BATCH.get(Path(word).name), tuple(rest[number + 1 :])
                return Invocation(program, own) if program else None
    return None


def faults_of(root: Path, commands: Iterable[Command]) -> list[str]:
    """What is wrong with commands as they stand: files, targets, extras, options, settings."""
    commands = list(commands)
    complaints = [f"{c}: {fault}" for c in commands for fault in _files_missing(root, c)]
    judged = [(c, i) for c in commands if (i := invocation_of(root, c))]
    judged = [(c, i) for c, i in judged if i.program in INSTALLED or (root / i.program).exists()]
    asked = [[invocation.program, *invocation.arguments] for _, invocation in judged]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.docs.parsers", str(root)],
        cwd=Path(__file__).parents[2],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    return complaints + [
        f"{command}: {answer}"
        for (command, _), answer in zip(judged, answers, strict=True)
        if answer
    ]


def _files_missing(root: Path, command: Command) -> list[str]:
    """Files of the repository, targets of make and extras of pip that a command names in vain."""
    missing = []
    for word in command.words:
        value = word.partition("=")[2] if word.startswith("-") else word
        is_ours = re.match(r"(examples|tests|tools|slurm)/[\w./-]+$|\w+\.(py|txt)$", value)
        if is_ours and not (root / value).exists():
            missing.append(f"there is no {value}")
    launcher, *rest = command.words
    if launcher not in LAUNCHERS and not launcher.endswith(".sh"):
        missing.append(f"{launcher} is no program that is known")
    if launcher == "make":
        makefile = (root / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            name, is_variable, _ = word.partition("=")
            pattern = rf"^{name} \?=" if is_variable else rf"^[\w -]*\b{name}\b[\w -]*:"
            if not re.search(pattern, makefile, flags=re.MULTILINE):
                missing.append(f"the Makefile has no {name}")
    if launcher == "pip":
        project = (root / "pyproject.toml").read_text(encoding="utf-8")
        extras = [e for word in rest for e in re.findall(r"(?<=[\[,])\w+", word) if "[" in word]
        missing += [
            f"pyproject.toml has no extra {e}" for e in extras if f"\n{e} = [" not in project
        ]
    return missing


def faults_of_mark(root: Path, mark: Mark) -> list[str]:
    """Name the tests of a block's mark that are not there."""
    return [f"no such file: {test}" for test in mark.tests if not (root / test).exists()]
