"""Exports and scores of real runs: in several layouts, resumed, failing, and refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import pretrain_coe
from megatron_coe.analysis.exact_match import exact_match
from megatron_coe.conversion.export_hf import to_hf
from megatron_coe.data.questions import read_questions
from megatron_coe.fault_tolerance.exit_codes import CONFIG_ERROR, NOT_WRITTEN
from megatron_coe.utils.metrics_file import read_records
from tests.functional import test_pretrain
from tests.functional.test_pretrain import losses, start

config, data = test_pretrain.config, test_pretrain.data  # fixtures

SCORE = ("checkpoint.score_samples=3", "checkpoint.score_max_new_tokens=3")
EVERY = ("checkpoint.save_interval=2", "checkpoint.hf_interval=2", "train.eval_interval=0")
LAYOUTS = {
    "TP 2, EP 2": ("tensor_model_parallel_size", "expert_model_parallel_size"),
    "PP 2": ("pipeline_model_parallel_size",),
}


@pytest.mark.parametrize("layout", ["TP 2, EP 2", pytest.param("PP 2", marks=pytest.mark.slow)])
def test_what_two_ranks_train_is_exported_and_scored_and_a_resumed_run_goes_on(
    config,
    tmp_path,
    capsys,
    layout,
):
    run, questions = tmp_path / "run", tmp_path / "questions.jsonl"
    lines = [{"query": f"{n} + 1?", "response": str(n + 1)} for n in range(4)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = (f"checkpoint.score_file={questions}", *SCORE)
    arguments = ["--config", config, *EVERY, *score, "train.steps=4", "log.interval=10"]
    sizes = [f"parallel.{size}=2" for size in LAYOUTS[layout]]
    sizes += ["parallel.expert_tensor_parallel_size=1"] * ("TP" in layout)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start(*arguments, *sizes, "train.exit_step=2", launcher=torchrun)
    out, err = process.communicate(timeout=600)  # on a busy machine an export comes last
    assert process.returncode == 0, out + err
    assert f"exported step 2 to {run}/hf/step_00000002" in out and out.count("exported") == 1
    _check_export(run, 2, questions, tmp_path)
    first = {p.name: p.stat().st_mtime_ns for p in (run / "hf/step_00000002").iterdir()}

    assert pretrain_coe.main([*map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert "exported step 4" in out and "exported step 2" not in out
    _check_export(run, 4, questions, tmp_path)
    assert {p.name: p.stat().st_mtime_ns for p in (run / "hf/step_00000002").iterdir()} == first
    records = read_records(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 4], "what is exported is recorded"
    assert all("tokens" in record for record in records)
    assert sorted(losses(run, "exact_match")) == [2, 4]


def _check_export(run: Path, step: int, questions: Path, work: Path) -> None:
    """It is what a conversion by itself writes, and its score what the model alone gets."""
    name = f"step_{step:08d}"
    exported, expected = run / "hf" / name, work / "expected" / name
    expected.parent.mkdir(exist_ok=True)
    to_hf(run / "checkpoints" / name, expected)
    assert sorted(p.name for p in exported.iterdir()) == sorted(p.name for p in expected.iterdir())
    weights, others = (load_file(f / "model.safetensors") for f in (exported, expected))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    score = exact_match(expected, read_questions(questions, 3), 3, torch.device("cpu"))
    assert losses(run, "exact_match")[step] == score.exact_match
    assert [path.name for path in (run / "hf").glob(".*")] == []


def test_a_failed_export_ends_no_run_and_the_same_command_makes_it(config, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "hf").write_text("in the way")
    arguments = ["--config", str(config), *EVERY, "checkpoint.hf_interval=4", "train.steps=2"]
    assert pretrain_coe.main(arguments) == NOT_WRITTEN
    out = capsys.readouterr().out
    assert "warning: the export of step 2 failed: " in out and f"{run}/hf" in out
    assert sorted(losses(run)) == [1, 2]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000002\n"
    (run / "hf").unlink()
    assert pretrain_coe.main(arguments) == 0
    assert "exported step 2" in capsys.readouterr().out
    assert [path.name for path in (run / "hf").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("checkpoint.hf_interval=3",), "hf_interval=3: must be a multiple of checkpoint.save_i"),
        (("checkpoint.hf_interval=2", "checkpoint.save_interval=0"), "save_interval=0, whose"),
        (("checkpoint.hf_interval=2", "checkpoint.save=null"), "checkpoint.save=null writes none"),
        (("checkpoint.score_file=x", "checkpoint.hf_interval=0"), "set checkpoint.hf_interval"),
        (("checkpoint.score_file=nowhere",), "checkpoint.score_file: [Errno 2]"),
        (("checkpoint.score_file={config}",), "checkpoint.score_file: {config}:1: not JSON"),
    ],
)
def test_what_cannot_be_exported_or_scored_is_refused(config, capsys, overrides, expected):
    overrides = [text.format(config=config) for text in (*EVERY, *overrides)]
    assert pretrain_coe.main(["--config", str(config), *overrides, "--dry-run"]) == CONFIG_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert expected.format(config=config) in line


@pytest.mark.slow
def test_a_killed_run_takes_its_export_along_and_the_next_start_makes_it(config, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--config", str(config), *EVERY, "train.steps=10000", "log.interval=1"]
    process = start(*arguments)
    new, deadline = run / "hf" / ".new", time.monotonic() + 120
    while not new.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    exports = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(exports, timeout=60)
    assert exports and alive == []
    assert not list(run.glob("hf/step_*"))

    assert pretrain_coe.main([*arguments, "train.exit_step=1"]) == 0
    assert "exported step " in capsys.readouterr().out
    (folder,) = (run / "hf").iterdir()
    assert (folder / "model.safetensors").exists()
