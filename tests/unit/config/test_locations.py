"""Settings that lie in a checkpoint or a run's folder name the places where they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_coe.config.loader import load_settings, settings_files
from megatron_coe.config.run_config import Settings


def written(save: str, log: str, tokenizer: str = "t.model") -> str:
    settings = Settings()
    settings.checkpoint.save, settings.log.dir = save, log
    settings.data.tokenizer = tokenizer
    return settings.to_yaml()


def checkpoint(step: Path, *own: str, **places: str) -> Path:
    """The settings of a folder that looks like a checkpoint with those files in it."""
    for name in ("metadata.json", *own):
        path = step / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (step / "config.yaml").write_text(written(**places))
    return step / "config.yaml"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def places(config: Path, *overrides: str) -> tuple[str, str | None, str | None, str]:
    """Folder of the run, of its checkpoints, what it starts from, and its tokenizer."""
    settings = load_settings(config, overrides)
    options = settings.checkpoint
    return settings.log.dir, options.save, options.load, settings.data.tokenizer


def test_where_the_run_left_it_a_checkpoint_resumes_that_run(folder):
    save = "run/checkpoints"
    step = Path(save, "step_00000006")
    config = checkpoint(step, "tokenizer.model", save=save, log="logs")
    own = str(folder / step / "tokenizer.model")
    assert places(config) == ("logs", save, str(folder / step), own)
    assert places(config, "data.tokenizer=mine", "checkpoint.load=null") == (
        *("logs", save, None, "mine"),
    )


@pytest.mark.parametrize(
    ("target", "log"),
    [("moved/checkpoints", "moved"), ("run/renamed", "run/renamed"), ("a/b", "a/b")],
)
def test_a_moved_checkpoint_resumes_where_it_lies(folder, target, log):
    step = Path("run/checkpoints/step_00000006")
    checkpoint(step, "tokenizer/tokenizer.json", save="run/checkpoints", log="run")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    step.parent.rename(target)
    moved = folder / target / step.name
    expected = (str(folder / log), str(folder / target), str(moved), str(moved / "tokenizer"))
    assert places(moved / "config.yaml") == expected
    assert places(Path(target, step.name, "config.yaml")) == expected
    assert places(moved / "config.yaml", "log.dir=x", "checkpoint.save=y")[:2] == ("x", "y")


def test_a_copy_beside_the_run_is_a_run_of_its_own(folder):
    step = Path("run/checkpoints/step_00000006")
    checkpoint(step, save="run/checkpoints", log="run")
    shutil.copytree(step, "second/checkpoints/step_00000006")
    config = Path("second/checkpoints/step_00000006/config.yaml")
    assert places(config)[:2] == (str(folder / "second"), str(folder / "second/checkpoints"))


def test_relative_paths_are_of_the_folder_they_were_written_in(folder, monkeypatch):
    step = Path("run/checkpoints/step_00000006")
    config = checkpoint(step, save="run/checkpoints", log="run").resolve()
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    save = folder / step.parent
    assert places(config) == (str(save.parent), str(save), str(save / step.name), "t.model")


def test_under_a_name_of_its_own_a_checkpoint_begins_a_run(folder):
    step = Path("run/checkpoints/step_00000006")
    checkpoint(step, "tokenizer.model", save="run/checkpoints", log="run")
    step.rename("run/checkpoints/best")
    best = folder / "run/checkpoints/best"
    expected = ("runs/best", "runs/best/checkpoints", str(best), str(best / "tokenizer.model"))
    assert places(best / "config.yaml") == expected


def test_settings_that_extend_a_checkpoints_follow_it(folder):
    step = Path("imp/checkpoints/step_00000000")
    base = checkpoint(step, "tokenizer/tokenizer.json", save="gone/checkpoints", log="gone")
    Path("mine.yaml").write_text(f"extends: {base}\nlog: {{dir: mine}}")
    at = folder / step
    expected = ("mine", str(at.parent), str(at), str(at / "tokenizer"))
    assert places(Path("mine.yaml")) == expected
    assert settings_files(Path("mine.yaml")) == [base, Path("mine.yaml")]


def test_what_an_earlier_version_imported_has_its_tokenizer_beside_it(folder):
    named = "imp/checkpoints/hf/tokenizer"
    step = Path("imp/checkpoints/step_00000000")
    checkpoint(step, save="imp/checkpoints", log="runs/checkpoints", tokenizer=named)
    Path(named).mkdir(parents=True)
    Path("imp").rename("moved")
    assert places(Path("moved/checkpoints/step_00000000/config.yaml")) == (
        str(folder / "moved"),
        str(folder / "moved/checkpoints"),
        str(folder / "moved/checkpoints/step_00000000"),
        str(folder / "moved/checkpoints/hf/tokenizer"),
    )


def test_a_runs_settings_follow_its_folder(folder):
    Path("run").mkdir()
    Path("run/config.yaml").write_text(written(save="run/checkpoints", log="run"))
    Path("run/machine.json").write_text("{}")
    assert places(Path("run/config.yaml"))[:2] == ("run", "run/checkpoints")
    Path("run").rename("moved")
    at = folder / "moved"
    expected = (str(at), str(at / "checkpoints"), None, "t.model")
    assert places(Path("moved/config.yaml")) == expected


@pytest.mark.parametrize("name", ["config.yaml", "other.yaml"])
def test_other_files_mean_what_they_say(name):
    Path(name).write_text(written(save="run/checkpoints", log="run"))
    assert places(Path(name)) == ("run", "run/checkpoints", None, "t.model")


def test_a_section_that_is_none_is_still_named():
    config = checkpoint(Path("step_00000006"), save="a", log="b")
    config.write_text("checkpoint: [1]\nlog: 3")
    with pytest.raises(ValueError, match=r"config\.yaml: .*CheckpointSettings"):
        load_settings(config)
