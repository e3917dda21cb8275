"""`pretrain_coe.py` as users start it: training, resuming, mistakes, signals, two ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import pretrain_coe
from megatron_coe.data.corpus import make_corpus
from megatron_coe.data.preprocess import preprocess
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import train_tokenizer
from megatron_coe.fault_tolerance.exit_codes import PREEMPTED, RANK_FAILURE
from megatron_coe.model.moe.layer import CoELayer
from megatron_coe.utils.environment import read_machine
from megatron_coe.utils.metrics_file import read_records

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
  mode: padded
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
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
    return {**os.environ, **fixed, **changes}


def start(*arguments: object, launcher: tuple[str, ...] = (), **options) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(REPO / "pretrain_coe.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPO, env=environment(), **pipes, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


LOSSES = ("train_loss", "grad_norm")
ROUTING = ("load/iteration_1/layer_1", "router_confidence/iteration_1", "grad_norm/routers")


def losses(folder: Path, name: str = "train_loss") -> dict[int, float]:
    return {r["step"]: r[name] for r in read_records(folder / "metrics.jsonl") if name in r}


def test_train_stop_resume_and_evaluate(config, tmp_path, capsys):
    """One process trains without a break; another stops, resumes, and ends with the same bits."""
    status, out, err = finish(start("--config", config))
    assert status == 0, err
    unbroken = tmp_path / "run"
    banner, steps = out.splitlines()[:-6], out.splitlines()[-6:]
    assert all(line.startswith("step ") for line in steps), "one line per step after the banner"
    assert banner[0].startswith("megatron_coe ") and len(banner) == 7
    said = "\n".join(banner)
    for part in ("CPU (", "fp32", "1 rank(s): DP 1", "2 of 4 experts and a shared one"):
        assert part in said
    for part in (
        "4 sequences of 32 tokens: 1 replica(s) x 4 micro-batch(es) of 1",
        "120 documents",
    ):
        assert part in said
    assert banner[-1].endswith(f"{tmp_path / 'run'}, from step 0, to step 6")
    assert out.splitlines()[-1].startswith("step 6/6 | loss ")
    assert "unigram entropy" in out.splitlines()[-1]
    assert sorted(losses(unbroken)) == [1, 2, 3, 4, 5, 6]
    assert sorted(losses(unbroken, "valid_loss")) == [3, 6]
    assert (unbroken / "checkpoints" / "latest").read_text().strip() == "step_00000006"
    assert list((unbroken / "tensorboard").iterdir())

    folder = tmp_path / "broken"
    arguments = ["--config", str(config), f"log.dir={folder}"]
    assert pretrain_coe.main([*arguments, "train.exit_step=4"]) == 0
    assert sorted(losses(folder)) == [1, 2, 3, 4]
    assert pretrain_coe.main(arguments) == 0
    assert "resumed from" in capsys.readouterr().out
    for name in ("train_loss", "valid_loss", "grad_norm", "lr", "epoch", "tokens", *ROUTING):
        assert losses(folder, name) == losses(unbroken, name)
        assert losses(folder, name), name
    assert len({*losses(folder).values()}) == 6
    clock = list(losses(folder, "seconds").values())
    assert clock == sorted(clock), "of both parts together"
    assert read_machine(folder)["ranks"] == 1

    # A dry run sees the checkpoint, and refuses what the run would.
    assert pretrain_coe.main([*arguments, "--dry-run"]) == 0
    assert f"resumed from {folder}/checkpoints/step_00000006" in capsys.readouterr().out
    assert pretrain_coe.main([*arguments, "--dry-run", "model.coe_residual=outer"]) == 2
    assert "was made with other settings: model.coe_residual" in capsys.readouterr().err

    # The settings that are kept with the run repeat it.
    assert pretrain_coe.main(["--config", str(folder / "config.yaml"), "--eval-only"]) == 0
    last = losses(folder, "valid_loss")[6]
    assert capsys.readouterr().out.splitlines()[-1] == f"step 6 | valid loss {last:.6f}"
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]


def test_what_is_resumed_from_outlives_what_is_damaged(config, tmp_path, capsys):
    """`keep` counts two that can be loaded, and the damaged one between them is not one."""
    folder = tmp_path / "run" / "checkpoints"
    arguments = ["--config", str(config), "train.eval_interval=0"]
    assert pretrain_coe.main([*arguments, "train.exit_step=2", "checkpoint.save_interval=1"]) == 0
    shard = folder / "step_00000002" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert pretrain_coe.main([*arguments, "train.exit_step=3"]) == 0
    assert "step_00000002 is bad and not used" in capsys.readouterr().err
    assert sorted(path.name[-1] for path in folder.glob("step_*")) == ["1", "2", "3"]


def test_training_sets_may_move_but_not_change(config, data, tmp_path, capsys):
    """On resume their content is compared, not their names."""
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    for suffix in ("bin", "idx"):
        (moved / f"b.{suffix}").rename(moved / f"c.{suffix}")
    arguments = ["--config", str(config), "data.valid=[]"]
    assert pretrain_coe.main([*arguments, "train.exit_step=1"]) == 0
    arguments += [f"data.train=[{moved}/a,{moved}/c]"]
    assert pretrain_coe.main([*arguments, "train.exit_step=2"]) == 0

    stored = moved / "c.bin"
    times = stored.stat().st_atime_ns, stored.stat().st_mtime_ns
    ids = np.memmap(stored, "<u2", "r+")
    ids[-1], ids[-2] = ids[-2], ids[-1]
    ids.flush()
    os.utime(stored, ns=times)
    capsys.readouterr()
    assert pretrain_coe.main([*arguments, "train.exit_step=3"]) == 2
    told = r"data\.train was 'c: 80 documents, [\d,]+ tokens, SHA-256 (\w{12})…' and is 'c: 80 docu"
    assert re.search(told, capsys.readouterr().err)
    meant = "checkpoint.allow_config_changes=[data.train]"
    assert pretrain_coe.main([*arguments, "train.exit_step=3", meant]) == 0
    assert pretrain_coe.main([*arguments, "train.exit_step=4"]) == 0


def test_two_ranks_compute_what_one_does_and_one_goes_on_from_there(config, data, tmp_path, capsys):
    """Data parallel with the distributed optimizer; then the checkpoint is loaded on one rank.

    In the midst of a ramp: the steps have 2, 2, 2, 2, 4 and 4 sequences.
    """
    alone, together = tmp_path / "alone", tmp_path / "together"
    changes = [
        "train.rampup_batch_size=[2,2,8]",
        *("train.lr_decay_style=WSD", "train.lr_wsd_decay_steps=4"),
        f"data.valid={{math: {data}/valid, seen: [{data}/a, {data}/b]}}",
    ]
    assert pretrain_coe.main(["--config", str(config), *changes, f"log.dir={alone}"]) == 0
    said = capsys.readouterr().out
    assert "4 sequences of 32 tokens" in said and "; ramped up from 2 to 4, by 2, over the" in said
    assert "10 sequences held out (math 5, seen 5)" in said
    assert re.search(r"step 3/6 .* valid loss/math \d\.\d{4} \| valid loss/seen \d", said)
    arguments = ["--config", config, *changes, f"log.dir={together}"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    layout = ["parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true"]
    status, out, err = finish(start(*arguments, *layout, "train.exit_step=3", launcher=torchrun))
    assert status == 0, err
    assert sum(line.startswith("step ") for line in out.splitlines()) == 3, "rank 0 alone speaks"
    assert pretrain_coe.main([*map(str, arguments), *layout]) == 0
    exact = ("lr", "samples", "tokens", "epoch", "global_batch_size")
    for name in (*exact, *(f"valid_loss{of}" for of in ("", "/math", "/seen")), *LOSSES):
        expected = losses(alone, name)
        assert expected and losses(together, name) == pytest.approx(
            expected, rel=0 if name in exact else 2e-5
        )
    assert list(losses(alone, "samples").values()) == [2, 4, 6, 8, 12, 16]
    assert losses(alone, "epoch")[6] == 16 / 120
    assert pretrain_coe.main([*map(str, arguments), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "16 sequences in 6 steps of 2 to 4, by 2, over the first 8 sequences" in said
    for summary in (f"validation data math\n{data}/valid: 20 doc", f"seen\n{data}/a: 40 doc"):
        assert summary in said
    tokenizer = (data / "tokenizer.model").read_bytes()
    for step in (3, 6):  # the first was written by two ranks
        copy = together / "checkpoints" / f"step_{step:08d}" / "tokenizer.model"
        assert copy.read_bytes() == tokenizer


@pytest.mark.slow
def test_launchers_of_two_nodes_meet_without_slurm(config):
    """As on two machines: each starts the same command, and they know one endpoint."""
    with socket.create_server(("localhost", 0)) as server:
        endpoint = f"localhost:{server.getsockname()[1]}"
    torchrun = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1")
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=my-run")
    arguments = ("--config", config, "train.steps=2")
    nodes = [start(*arguments, launcher=(*torchrun, *rendezvous)) for _ in range(2)]
    ended = [finish(node) for node in nodes]
    assert [status for status, _, _ in ended] == [0, 0], ended
    said = "".join(out for _, out, _ in ended)
    assert said.count("2 rank(s): DP 2") == 1 and said.count("step 2/2 | loss ") == 1


def test_dry_run_prints_and_builds_nothing(config, tmp_path, capsys):
    layout = "parallel.expert_model_parallel_size=2"
    assert pretrain_coe.main(["--config", str(config), "--dry-run", layout, "train.steps=9"]) == 0
    out = capsys.readouterr().out
    for expected in ("steps: 9", "parameters", "FLOPs per token", "2 rank(s)", "80 documents"):
        assert expected in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("size", "count"), [(1, 0), (4, 1)])
def test_a_global_aux_loss_of_several_micro_batches_is_warned_of(config, capsys, size, count):
    balance = "model.moe_router_load_balancing_type=global_aux_loss"
    batch = ["train.micro_batch_size=1", f"train.global_batch_size={size}"]
    assert pretrain_coe.main(["--config", str(config), "--dry-run", balance, *batch]) == 0
    assert capsys.readouterr().out.count("with 4 micro-batches per step global_aux_loss") == count


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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.cpu_offloading=true", "cpu_offloading=True needs Transformer Engine"),
        ("model.softmax_type=off-by-one", "softmax_type='off-by-one': backend='torch' has only"),
        ("model.qk_clip=true", "qk_clip=True"),
        ("log.wandb_project=p", "log.wandb_project='p' needs the package wandb"),
        ("log.dir={config}", "{config}/checkpoints: cannot be written (Not a directory)"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(config, tmp_path, capsys, override, expected):
    override, expected = override.format(config=config), expected.format(config=config)
    for mode in ([], ["--dry-run"]):
        assert pretrain_coe.main(["--config", str(config), override, *mode]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1
        assert expected in captured.err
        assert not (tmp_path / "run").exists()


def test_latent_attention_that_cannot_be_divided_is_refused_by_a_dry_run(config, capsys):
    """Megatron's module asserts it, once process groups are made."""
    model = ("model.num_attention_heads=6", "model.qk_pos_emb_head_dim=4", "model.seq_length=48")
    model += ("model.moe_shared_expert_intermediate_size=48", "model.moe_ffn_hidden_size=48")
    layout = "parallel.tensor_model_parallel_size=3"
    assert pretrain_coe.main(["--config", str(config), *model, layout, "--dry-run"]) == 2
    assert "kv_lora_rank + qk_pos_emb_head_dim=20 is not divisible" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU")
def test_gpus_that_slurm_has_allocated_are_not_left_idle(config, monkeypatch, capsys):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for mode in ([], ["--dry-run"]):
        assert pretrain_coe.main(["--config", str(config), *mode]) == 2
        said = capsys.readouterr().err
        assert "SLURM_GPUS_ON_NODE=2: Slurm has allocated GPUs, and PyTorch sees none" in said
        assert ("a build without CUDA" in said) == (torch.version.cuda is None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pretrain_coe.main(["--config", str(config), "--dry-run"]) == 0


def test_a_full_device_is_said_in_one_line_with_what_helps(config, monkeypatch, capsys):
    """CUDA's allocator cannot be made to fail without a GPU: its words are raised in its place."""
    calls = []

    def forward(self, hidden, *arguments, **keywords):
        calls.append(self)
        if len(calls) > 2 * 4:  # layers x micro-batches: in the second step
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                "79.11 GiB of which 1.00 GiB is free. If reserved but unallocated memory is large"
            )
        return original(self, hidden, *arguments, **keywords)

    original = CoELayer.forward
    monkeypatch.setattr(CoELayer, "forward", forward)
    arguments = ["--config", str(config), "train.micro_batch_size=2", "train.global_batch_size=8"]
    assert pretrain_coe.main(arguments) == RANK_FAILURE
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("step 2, micro-batch 1, layer 1", "Tried to allocate 2.00 GiB", "is free. What"):
        assert part in line
    for remedy in ("train.micro_batch_size=1", "model.recompute_granularity=selective"):
        assert remedy in line
    assert "use_distributed_optimizer" not in line, "there is one rank"
    assert "reserved but unallocated" not in line


def test_evaluating_without_a_checkpoint_is_refused(config, capsys):
    assert pretrain_coe.main(["--config", str(config), "--eval-only"]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err


def test_a_vocabulary_larger_than_the_tokenizers_trains(config, tmp_path):
    overrides = ["model.vocab_size=500", "train.steps=1", "log.profile_steps=[1, 1]"]
    assert pretrain_coe.main(["--config", str(config), *overrides]) == 0
    trace = json.loads((tmp_path / "run" / "profile" / "steps_1_1.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])


LONG = "train.steps=25"


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    """A run that nothing stops, for those that a signal does."""
    folder = tmp_path_factory.mktemp("unbroken")
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(data=data, folder=folder / "run"), encoding="utf-8")
    assert pretrain_coe.main(["--config", str(path), LONG]) == 0
    return folder / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_saved_and_the_same_command_goes_on(
    unbroken, config, tmp_path, capfd, number
):
    folder = tmp_path / "run"
    arguments = ["--config", str(config), LONG]
    with once_it_has_steps(folder, 3, lambda: os.kill(os.getpid(), number)):
        assert pretrain_coe.main(arguments) == PREEMPTED
    stopped = max(losses(folder))
    assert 3 <= stopped < 25
    assert f"stopped by {number.name} after step {stopped}\n" in capfd.readouterr().out
    assert (folder / "checkpoints" / "latest").read_text() == f"step_{stopped:08d}\n"
    assert pretrain_coe.main(arguments) == 0
    for name in ("train_loss", "valid_loss", "grad_norm", "lr"):
        assert losses(folder, name) == losses(unbroken, name)


def test_a_signal_where_nothing_is_kept_has_another_status(config, tmp_path):
    arguments = ["--config", str(config), "train.steps=10000", "checkpoint.save=null"]
    with once_it_has_steps(tmp_path / "run", 1, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert pretrain_coe.main(arguments) == 128 + signal.SIGTERM


def test_signals_to_every_process_leave_the_run_saved(config, tmp_path):
    """Also to those that the first checkpoint started, which the last one needs."""
    long = ["train.steps=10000", "checkpoint.save_interval=2"]
    process = start("--config", config, *long, start_new_session=True)

    def signal_all() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.killpg(process.pid, number)
            time.sleep(0.05)

    with once_it_has_steps(tmp_path / "run", 3, signal_all):
        status, out, err = finish(process)
    assert status == PREEMPTED, err
    assert err == "SIGINT: stopping before the next step (Ctrl-C again: at once)\n"
    stopped = max(losses(tmp_path / "run"))
    assert out.splitlines()[-1] == f"stopped by SIGINT after step {stopped}"
    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert latest.read_text() == f"step_{stopped:08d}\n"


def test_the_launcher_returns_the_status_of_ranks_of_which_one_was_signaled(config, tmp_path):
    launcher = (str(REPO / "slurm" / "launch.py"), "--standalone", "--nproc-per-node=2")
    process = start("--config", config, "train.steps=10000", launcher=launcher)

    def signal_rank_1() -> None:
        ranks = psutil.Process(process.pid).children()
        (second,) = (rank for rank in ranks if rank.environ()["RANK"] == "1")
        second.send_signal(signal.SIGUSR1)

    with once_it_has_steps(tmp_path / "run", 3, signal_rank_1):
        status, out, err = finish(process)
    assert status == PREEMPTED, err
    stopped = max(losses(tmp_path / "run"))
    assert f"stopped by SIGUSR1 after step {stopped}" in out
    assert "Traceback" not in err
    checkpoint = tmp_path / "run" / "checkpoints" / f"step_{stopped:08d}"
    assert (checkpoint / "metadata.json").is_file()


@contextmanager
def once_it_has_steps(folder: Path, steps: int, act: Callable[[], None]) -> Iterator[None]:
    """Acts, beside what runs inside, as soon as the run has reported so many steps."""
    ended = threading.Event()

    def watch() -> None:
        metrics = folder / "metrics.jsonl"
        while not ended.wait(0.01):
            if metrics.exists() and metrics.read_text().count("\n") >= steps:
                return act()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
