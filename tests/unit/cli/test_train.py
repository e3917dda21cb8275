"""`coe train` where it is asked about settings, and trains nothing."""

from __future__ import annotations

import json

import pytest

from megatron_coe.cli.train import parse


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what the command prints, which ends it well whatever else is given."""
    with pytest.raises(SystemExit) as end:
        parse(list(arguments), "coe train")
    assert end.value.code == 0
    return capsys.readouterr().out


def test_settings_are_described_by_name_and_by_words(capsys):
    text = printed(capsys, "--help", "model.moe_router")
    assert "\nmodel.moe_router_topk = 4    an integer >= 1\n" in text
    assert all(line.startswith(("model.moe_router", "    ")) for line in text.splitlines())
    assert "train.seed = 42" in printed(capsys, "--config", "quickstart", "-h", "train.seed")


def test_help_without_a_setting_is_the_commands(capsys):
    assert "--dry-run" in printed(capsys, "--help")


def test_an_unknown_setting_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help", "train.step_count"], "coe train")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: no setting is called 'train.step_count'")


def test_the_schema_is_json(capsys):
    document = json.loads(printed(capsys, "--json-schema"))
    assert document["properties"]["train"]["properties"]["lr"]["default"] == 3e-4
