"""Options by their former names, and `coe` itself."""

from __future__ import annotations

import importlib
import sys

import pytest

from megatron_coe.cli import main as coe

RENAMED = [
    ("convert", "to-hf --input a --output b", "to-hf --load a --save b"),
    ("convert", "from-hf --input a --output b", "from-hf --load a --save b"),
    ("upcycle", "--input a --output b", "--load a --save b"),
    ("verify", "--input a", "--load a"),
    ("generate", "--model a --prompt x", "--load a --prompt x"),
    ("analyze", "--model a --input b --output c", "--load a --data b --output c"),
    ("make_corpus", "--output a", "--output-dir a"),
    (
        *("preprocess", "--input a --tokenizer t --output-prefix b"),
        "--input a --tokenizer t --output b",
    ),
    ("compare", "c --output a", "c --directory a"),
]
"""A command, arguments under their names, and under those of earlier versions."""


def parse(command: str, arguments: str):
    return importlib.import_module(f"megatron_coe.cli.{command}").parse(arguments.split(), None)


@pytest.mark.parametrize(("command", "present", "former"), RENAMED)
def test_former_names_are_read_and_not_shown(command, present, former, capsys):
    assert parse(command, present) == parse(command, former)
    with pytest.raises(SystemExit):
        parse(command, f"{present} --help")
    words = capsys.readouterr().out.replace(",", " ").replace("]", " ").split()
    hidden = {word for word in former.split() if word.startswith("--")} - set(present.split())
    assert hidden and not hidden & set(words)


def test_an_error_names_the_present_option(capsys):
    with pytest.raises(SystemExit):
        parse("verify", "")
    assert capsys.readouterr().err.endswith("the following arguments are required: --input\n")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("experiments", "main --input a --valid-input b --output c train.lr=1"),
        ("experiments", "main --data a --valid-data b --directory c --set train.lr=1"),
        ("benchmarks", "train.lr=1 --what step"),
        ("benchmarks", "--what step --set train.lr=1"),
    ],
)
def test_those_of_the_checkout_too(module, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, *arguments.split()])
    options = importlib.import_module(f"{module}.command").parse()
    assert options.overrides == ["train.lr=1"]
    if module == "experiments":
        assert [options.input, options.valid_input, str(options.output)] == ["a", "b", "c"]


@pytest.mark.parametrize("former", [False, True])
def test_settings_for_all_runs_of_a_comparison(former, monkeypatch):
    from megatron_coe.cli import compare

    given = {}
    monkeypatch.setattr(compare, "as_table", lambda *arguments: "")
    monkeypatch.setattr(
        compare,
        "compare",
        lambda configs, seeds, output, overrides, *more: given.update(
            configs=[config.name for config in configs], overrides=overrides
        ),
    )
    changes = ["train.steps=3", "train.lr=1"]
    words = ["compare/moe_8-32", "paper/coe-2_4-64"]
    words += ["--set", *changes] if former else changes
    compare.command(compare.parse(words, None))
    assert given == {"configs": ["moe_8-32.yaml", "coe-2_4-64.yaml"], "overrides": changes}


@pytest.mark.parametrize("command", coe.COMMANDS)
def test_every_command_says_how_it_is_called(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["coe", command, "--help"])
    with pytest.raises(SystemExit) as end:
        coe.main()
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.startswith(f"usage: coe {command} ")
    assert f"coe {command}" in said.partition("\n\n")[2], "an example"


def test_a_command_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["coe", "training"])
    with pytest.raises(SystemExit) as end:
        coe.main()
    assert end.value.code == 2 and "'training' (choose from" in capsys.readouterr().err
