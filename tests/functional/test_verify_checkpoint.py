"""`tools/verify_checkpoint.py`: what is bad is named, and a missing manifest can be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.resume import latest_valid_checkpoint
from megatron_coe.cli.verify import command, parse
from tests.unit.training.runs import make_settings, make_trainer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "verify_checkpoint.py"


def main(arguments: list[str]) -> None:
    command(parse(arguments, None))


@pytest.fixture
def folder(single_rank, tmp_path):
    trainer = make_trainer(make_settings(tmp_path, model={"num_layers": 1}), single_rank)
    for _ in range(2):
        trainer.step()
        trainer.save()
    return tmp_path


def test_good_and_bad_are_told_apart(folder, capsys):
    newest, older = find_checkpoints(folder)
    main(["--input", str(folder)])
    assert capsys.readouterr().out == f"{newest}: good, step 2\n{older}: good, step 1\n"
    (newest / "notes.txt").write_text("the good one")
    main(["--input", str(folder)])
    assert "does not list notes.txt" in capsys.readouterr().err
    assert latest_valid_checkpoint(make_settings(folder).checkpoint) == newest
    assert f"{newest}: manifest.json does not list notes.txt" in capsys.readouterr().err
    (newest / "__7_0.distcp").write_bytes(b"")
    assert latest_valid_checkpoint(make_settings(folder).checkpoint) == older
    assert "manifest.json does not list __7_0.distcp" in capsys.readouterr().err
    (newest / "__7_0.distcp").unlink()
    data = older / "__0_1.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    main(["--input", str(newest)])
    with pytest.raises(ValueError, match=r"1 of 2 checkpoint\(s\)"):
        main(["--input", str(folder)])
    assert f"{older}: bad: __0_1.distcp has" in capsys.readouterr().out
    told = subprocess.run(
        [sys.executable, TOOL, "--input", folder / "nowhere"], capture_output=True, text=True
    )
    assert told.returncode == 2
    assert told.stderr.startswith("error: ")
    assert "neither a checkpoint" in told.stderr


def test_a_manifest_is_written_once(folder, capsys):
    newest, older = find_checkpoints(folder)
    (newest / "manifest.json").unlink()
    settings = make_settings(folder)
    assert latest_valid_checkpoint(settings.checkpoint) == older
    main(["--input", str(newest), "--write-manifest"])
    assert latest_valid_checkpoint(settings.checkpoint) == newest
    with pytest.raises(ValueError, match="1 of 1"):
        main(["--input", str(newest), "--write-manifest"])
    assert "is there already" in capsys.readouterr().out
