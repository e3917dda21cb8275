"""Settings files by their paths, and presets by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_coe.config.presets import find_settings, preset_names, presets_folder


def test_every_name_is_a_file():
    names = preset_names()
    assert {"quickstart", "paper/coe-2_4-64", "scale/moe_8-65", "compare/base"} <= set(names)
    assert not [name for name in names if name.startswith(("evaluate", "megatron_lm"))]
    assert all(find_settings(name).is_file() for name in names)


def test_a_file_wins_over_a_preset_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_settings("quickstart") == presets_folder() / "quickstart.yaml"
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text("train: {steps: 1}\n")
    assert find_settings("quickstart") == Path("quickstart")


def test_a_path_is_left_to_its_reader(tmp_path):
    assert find_settings(f"{tmp_path}/none.yaml") == tmp_path / "none.yaml"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("paper/coe-2_4-46", "did you mean the preset 'paper/coe-2_4-64'?"),
        ("../setup", "neither a file nor a preset"),
        ("§", "known are compare/base, "),
    ],
)
def test_what_is_neither_is_refused(name, hint):
    with pytest.raises(ValueError, match="is neither a file nor a preset; ") as error:
        find_settings(name)
    assert hint in str(error.value)
