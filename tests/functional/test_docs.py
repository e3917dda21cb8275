"""The documentation: its commands are right and marked, its links lead somewhere.

A comment under each command says who runs it, or why no test does (`tests/docs/pages.py` has the
forms). Commands are held to the programs' own parsers, and some are run as they stand.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from megatron_coe.config.run_config import Settings
from megatron_coe.fault_tolerance import exit_codes
from tests.docs.commands import faults_of, faults_of_mark
from tests.docs.pages import (
    Block,
    Mark,
    blocks_of,
    broken_links,
    commands_of,
    inline_commands,
    mark_of,
    pages_of,
)

REPO = Path(__file__).parents[2]
SEEN_FROM_A_COPY = ("megatron_coe", "tools", "examples", "slurm", "pretrain_coe.py")
TRAINING = (REPO / "docs/training.md").read_text(encoding="utf-8")
DATA = Path("docs/data.md")
"""The page whose commands make the data that others read."""

BLOCKS = [
    block
    for page in pages_of(REPO)
    for block in blocks_of(page, (REPO / page).read_text(encoding="utf-8"))
]
MARKED = [
    (block, mark_of(block), commands) for block in BLOCKS if (commands := [*commands_of(block)])
]


def run_literally(of_data: bool) -> list:
    """Blocks whose mark says so, each with its mark."""
    return [
        pytest.param(block, mark, id=f"{block.page}:{block.line}")
        for block, mark, _ in MARKED
        if mark and mark.literally and (block.page == DATA) == of_data
    ]


def test_every_command_is_marked():
    bare = [f"{commands[0]}: {block.comment!r}" for block, mark, commands in MARKED if not mark]
    assert len(MARKED) > 30
    told = "\n".join(["put a comment under these: tests/docs/pages.py has the forms", *bare])
    assert not bare, told


def test_marks_name_tests():
    faults = [
        f"{commands[0]}: {fault}"
        for _, mark, commands in MARKED
        for fault in faults_of_mark(REPO, mark or Mark())
    ]
    assert not faults, "\n".join(faults)


def test_programs_accept_their_arguments_and_files_exist():
    inline = [
        command
        for page in pages_of(REPO)
        for command in inline_commands(page, (REPO / page).read_text(encoding="utf-8"))
    ]
    commands = [command for _, _, commands in MARKED for command in commands] + inline
    assert len(commands) > 60
    faults = faults_of(REPO, commands)
    assert not faults, "\n".join(faults)


def test_links_lead_to_files_and_headings():
    faults = [fault for page in pages_of(REPO) for fault in broken_links(REPO, page)]
    assert not faults, "\n".join(faults)


def test_tests_that_pages_name_exist():
    named = [
        (page, *found)
        for page in pages_of(REPO)
        for found in re.findall(
            r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (REPO / page).read_text(encoding="utf-8")
        )
    ]
    assert len(named) > 40
    missing = [
        f"{page}: {path}::{name}"
        for page, path, name in named
        if not (REPO / path).exists() or (name and f"def {name}(" not in (REPO / path).read_text())
    ]
    assert not missing, "\n".join(missing)


def test_settings_are_told_with_their_defaults():
    """All of them, and no others; section `model` has too many."""
    sections = {name: keys for name, keys in asdict(Settings()).items() if name != "model"}
    row = rf"^\| `((?:{'|'.join(sections)})\.\w+)` \| ([^|]+) \|"
    told = dict(re.findall(row, TRAINING, flags=re.MULTILINE))
    known = {f"{name}.{key}": v for name, section in sections.items() for key, v in section.items()}
    assert told.keys() == known.keys()
    for key, default in known.items():
        value = yaml.safe_load(told[key])
        assert (float(value) if isinstance(default, float) else value) == default, key


def test_settings_in_passing_exist():
    sections = {name: set(keys) for name, keys in asdict(Settings()).items() if name != "model"}
    files = {"md", "bin", "idx", "json", "jsonl", "model", "parquet", "py", "sh", "txt"}
    unknown = [
        f"{page}: {section}.{key}"
        for page in pages_of(REPO)
        for code in re.findall(r"`([^`\n]+)`", (REPO / page).read_text(encoding="utf-8"))
        for section, key in re.findall(rf"(?<![\w./])({'|'.join(sections)})\.(\w+)\b", code)
        if key not in sections[section] | files
        and not (key.endswith("_") and any(k.startswith(key) for k in sections[section]))
    ]
    assert not unknown, "\n".join(unknown)


def test_exit_statuses_are_told():
    told = {int(n) for n in re.findall(r"^\| (\d+) \|", TRAINING, flags=re.MULTILINE)}
    assert told == {v for name, v in vars(exit_codes).items() if name.isupper()}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout, with the data of docs/data.md made as the page says."""
    pytest.importorskip("reasoning_gym", reason="the corpus needs the extra `data`")
    folder = tmp_path_factory.mktemp("workplace")
    for name in SEEN_FROM_A_COPY:
        (folder / name).symlink_to(REPO / name)
    (folder / "bin").mkdir()
    for name, started in (("python", ""), ("coe", "-m megatron_coe.cli.main")):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore {started} "$@"\n')
        program.chmod(0o755)
    example, *_ = re.findall(r"```yaml\n(.*?)```", TRAINING, flags=re.DOTALL)
    (folder / "my-run.yaml").write_text(example, encoding="utf-8")
    for parameters in run_literally(of_data=True):
        shell(folder, parameters.values[0])
    shutil.copytree(folder / "data", folder / "runs" / "quickstart" / "data")
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def shell(folder: Path, block: Block) -> str:
    """What a block of commands prints, run as it stands."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{block.page}:{block.line}: {done.stderr}"
    return done.stdout


def test_the_page_on_data_makes_data(workplace):
    assert run_literally(of_data=True)
    made = {path.name for path in (workplace / "data").iterdir()}
    assert made >= {"tokenizer.model", "train.bin", "train.idx", "valid.bin", "valid.idx"}


@pytest.mark.parametrize(("block", "mark"), run_literally(of_data=False))
def test_commands_run_as_they_stand(workplace, block: Block, mark: Mark):
    printed = shell(workplace, block)
    assert printed.strip()
    if mark.prints:
        following = [b for b in BLOCKS if b.page == block.page and b.line > block.line]
        assert printed.rstrip() == following[0].text.rstrip(), "what the page shows is out of date"


def test_models_are_compared(workplace):
    small = "train.steps=1 train.global_batch_size=2 train.micro_batch_size=2 train.eval_samples=2"
    done = subprocess.run(
        [
            *(sys.executable, "tools/compare.py", "--seeds", "1", "--output", "runs/compare"),
            *("model.num_layers=1", "model.num_moe_experts=8", *small.split()),
            *("examples/compare/moe_8-32.yaml", "examples/compare/coe-2_4-32.yaml"),
        ],
        cwd=workplace,
        env=environment(workplace),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| coe-2_4-32 \| \d\.\d{4} \|", done.stdout, flags=re.MULTILINE)
    assert (workplace / "runs" / "compare" / "moe_8-32_seed-1" / "metrics.jsonl").is_file()
