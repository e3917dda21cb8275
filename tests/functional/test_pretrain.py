"""`pretrain_coe.py` as users start it: training, resuming, mistakes, Ctrl-C, two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pretrain_coe
from megatron_coe.data.corpus import make_corpus
from megatron_coe.data.preprocess import preprocess
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import train_tokenizer
from megatron_coe.training.metrics import read_records

REPO = Path(__file__).parents[2]

CONFIG = """
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  seq_length: 32
  multi_latent_attention: true
  kv_lora_rank: 16
  qk_head_dim: 8
  qk_pos_emb_head_dim: 8
  v_head_dim: 8
  num_moe_experts: 4
  moe_router_topk: 2
  moe_ffn_hidden_size: 16
  moe_shared_expert_intermediate_size: 16
data:
  tokenizer: {data}/tokenizer.model
  train: [{data}/a, {data}/b]
  train_weights: [1, 3]
  valid: [{data}/valid]
  mode: examples
train:
  steps: 6
  global_batch_size: 4
  micro_batch_size: 1
  lr: 0.01
  eval_interval: 3
  eval_samples: 5
log:
  dir: {folder}
  interval: 1
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two training sets, a held-out set and their tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    fields = Fields(("query", "response"), question_answer=True)
    train, valid = make_corpus(folder, train_size=120, valid_size=20, seed=5)
    tokenizer = folder / "tokenizer.model"
    train_tokenizer([train], tokenizer, fields=fields, vocab_size=400)
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
    (folder / "b.jsonl").write_text("".join(lines[40:]), encoding="utf-8")
    for name in ("a", "b", valid.stem):
        source = folder / f"{name}.jsonl"
        preprocess([source], folder / name, tokenizer, fields=fields, workers=1, append_eod=True)
    return folder


@pytest.fixture
def config(data, tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(data=data, folder=tmp_path / "run"), encoding="utf-8")
    return path


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def start(*arguments: object, launcher: tuple[str, ...] = (), **options) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(REPO / "pretrain_coe.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPO, env=environment(), **pipes, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def losses(folder: Path, name: str = "train_loss") -> dict[int, float]:
    return {r["step"]: r[name] for r in read_records(folder / "metrics.jsonl") if name in r}


def test_train_stop_resume_and_evaluate(config, tmp_path, capsys):
    """One process trains without a break; another stops, resumes, and ends with the same bits."""
    status, out, err = finish(start("--config", config))
    assert status == 0, err
    unbroken = tmp_path / "run"
    assert len(out.splitlines()) == 6, "one line per step, and nothing else"
    assert out.splitlines()[-1].startswith("step 6/6 | loss ")
    assert "unigram entropy" in out.splitlines()[-1]
    assert sorted(losses(unbroken)) == [1, 2, 3, 4, 5, 6]
    assert sorted(losses(unbroken, "valid_loss")) == [3, 6]
    assert (unbroken / "checkpoints" / "latest").read_text().strip() == "step_00000006"
    assert list((unbroken / "tensorboard").iterdir())

    folder = tmp_path / "broken"
    arguments = ["--config", str(config), f"log.dir={folder}"]
    assert pretrain_coe.main([*arguments, "train.stop_step=4"]) == 0
    assert sorted(losses(folder)) == [1, 2, 3, 4]
    assert pretrain_coe.main(arguments) == 0
    assert "resumed from" in capsys.readouterr().out
    for name in ("train_loss", "valid_loss", "grad_norm", "lr"):
        assert losses(folder, name) == losses(unbroken, name)
    assert len({*losses(folder).values()}) == 6

    # The settings that are kept with the run repeat it.
    assert pretrain_coe.main(["--config", str(folder / "config.yaml"), "--eval-only"]) == 0
    last = losses(folder, "valid_loss")[6]
    assert capsys.readouterr().out.splitlines()[-1] == f"step 6 | valid loss {last:.6f}"
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]


def test_two_ranks_compute_what_one_does_and_one_goes_on_from_there(config, tmp_path):
    """Data parallel with the distributed optimizer; then the checkpoint is loaded on one rank."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert pretrain_coe.main(["--config", str(config), f"log.dir={alone}"]) == 0
    arguments = ["--config", config, f"log.dir={together}"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    layout = ["parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true"]
    status, out, err = finish(start(*arguments, *layout, "train.stop_step=3", launcher=torchrun))
    assert status == 0, err
    assert sum(line.startswith("step ") for line in out.splitlines()) == 3, "rank 0 alone speaks"
    assert pretrain_coe.main([*map(str, arguments), *layout]) == 0
    for name in ("train_loss", "valid_loss", "grad_norm"):
        expected = losses(alone, name)
        assert losses(together, name) == pytest.approx(expected, rel=2e-5)


def test_dry_run_prints_and_builds_nothing(config, tmp_path, capsys):
    layout = "parallel.expert_model_parallel_size=2"
    assert pretrain_coe.main(["--config", str(config), "--dry-run", layout, "train.steps=9"]) == 0
    out = capsys.readouterr().out
    for expected in ("steps: 9", "parameters", "FLOPs per token", "2 rank(s)", "80 documents"):
        assert expected in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train.stpes=1"], "unknown key 'train.stpes'; did you mean 'steps'?"),
        (["train.steps=none"], "train.steps: Value 'none'"),
        (["parallel.tensor_model_parallel_size=2"], "does not divide the number of processes, 1"),
        (["train.global_batch_size=3", "train.micro_batch_size=2"], "not a multiple of"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line_before_megatron_is_loaded(
    config, arguments, expected
):
    blocked = "import sys; sys.modules['torch'] = None; import pretrain_coe; "
    command = [sys.executable, "-O", "-c", blocked + "sys.exit(pretrain_coe.main(sys.argv[1:]))"]
    result = subprocess.run(
        [*command, "--config", str(config), *arguments],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layer=2", "unknown key 'model.num_layer'; did you mean 'num_layers'?"),
        ("model.num_layers=two", "model.num_layers='two': must be an integer"),
        ("model.moe_router_topk=5", "moe_router_topk=5"),
        ("model.bf16=true", "model.bf16 is decided by train.precision"),
        ("model.tensor_model_parallel_size=2", "is decided by parallel.tensor_model_parallel_size"),
        ("model.vocab_size=100", "smaller than the 400 ids"),
        ("model.moe_router_enable_expert_bias=true", "sigmoid"),
        ("data.tokenizer=nowhere.model", "tokenizer nowhere.model does not exist"),
        ("data.valid=[nowhere]", "nowhere.idx does not exist"),
        ("data.train=[]", "train"),
    ],
)
def test_a_mistake_in_model_or_data_is_one_line(config, tmp_path, capsys, override, expected):
    assert pretrain_coe.main(["--config", str(config), override]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert expected in captured.err
    assert not (tmp_path / "run").exists()


def test_evaluating_without_a_checkpoint_is_refused(config, capsys):
    assert pretrain_coe.main(["--config", str(config), "--eval-only"]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err


def test_a_vocabulary_larger_than_the_tokenizers_trains(config, tmp_path):
    overrides = ["model.vocab_size=500", "train.steps=1", "log.profile_steps=[1, 1]"]
    assert pretrain_coe.main(["--config", str(config), *overrides]) == 0
    trace = json.loads((tmp_path / "run" / "profile" / "steps_1_1.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])


def test_ctrl_c_ends_a_run_cleanly(config, tmp_path):
    process = start("--config", config, "train.steps=1000000", start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            path = tmp_path / "run" / "metrics.jsonl"
            if path.exists() and len(path.read_text().splitlines()) > 2:
                break
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        status, _, err = finish(process)
    finally:
        process.kill()
    assert status == 130, err
    assert err.strip() == "pretrain_coe.py: stopped by Ctrl-C"
    assert read_records(tmp_path / "run" / "metrics.jsonl")[0]["step"] == 1
