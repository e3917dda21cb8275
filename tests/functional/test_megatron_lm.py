"""Megatron-LM's own `pretrain` trains our model: run on the checkout that MEGATRON_LM_PATH names.

MEGATRON_LM_PYTHON is the interpreter to run the checkout with, where it needs a newer one than the
tests (its main branch needs Python 3.12) or packages of its own (triton).
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_coe.model.provider import CoEModelProvider
from tests.functional.megatron_lm import CLIP, DECAY, FIELDS, LR, MODEL, STEPS, TRAINING
from tests.zygote import REPO

MEGATRON_LM = os.environ.get("MEGATRON_LM_PATH")
SCRIPT = REPO / "examples/megatron_lm/pretrain_coe_megatron.py"
MICRO_BATCHES = 2

pytestmark = pytest.mark.skipif(
    not MEGATRON_LM, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"
)

BATCH = shlex.split(f"--micro-batch-size 2 --global-batch-size {2 * MICRO_BATCHES} --mock-data")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pretrain(work: Path, arguments: str = "", world_size: int = 1) -> str:
    """Run the example script with Megatron-LM in `work`; return what the last rank printed.

    `work/record.pt` then holds what `record_megatron_lm.py` records.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([MEGATRON_LM or "", str(REPO)]),
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
    }
    python = os.environ.get("MEGATRON_LM_PYTHON", sys.executable)
    recorder = REPO / "tests/functional/record_megatron_lm.py"
    command = [python, "-W", "ignore", recorder, "record.pt", SCRIPT, *MODEL, *TRAINING, *BATCH]
    logs = [work / f"rank{rank}.log" for rank in range(world_size)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                ranks.append(
                    subprocess.Popen(
                        [*map(str, command), *shlex.split(arguments)],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        cwd=work,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        codes = [rank.wait(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(codes), logs[0].read_text()[-4000:]
    return logs[-1].read_text()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """What one rank printed, and its record."""
    work = tmp_path_factory.mktemp("single")
    output = pretrain(work)
    return output, torch.load(work / "record.pt")


def logged(output: str, name: str) -> list[float]:
    """A value that Megatron-LM prints per step (on the last rank)."""
    return [float(value) for value in re.findall(rf"\| {name}: ([-+.\dE]+) \|", output)]


def test_pretrain_trains_our_model(single_rank, single) -> None:
    """Megatron-LM's losses are those of our model in a plain loop over its batches."""
    output, record = single
    fields = {**FIELDS, "vocab_size": record["vocab_size"]}  # before 0.19 one more, for the eod
    model = CoEModelProvider(**fields).provide().train()
    model.load_state_dict(record["weights"], strict=False)
    assert {name for name, _ in model.named_parameters()} == record["weights"].keys()

    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    rest = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / MICRO_BATCHES))
    losses, norms = [], []
    for step in range(STEPS):
        step_loss = 0.0
        for batch in record["batches"][step * MICRO_BATCHES : (step + 1) * MICRO_BATCHES]:
            tokens, mask = batch["tokens"], batch["loss_mask"]
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            per_token = model(tokens, positions, None, labels=batch["labels"])
            loss = (per_token * mask).sum() / mask.sum() / MICRO_BATCHES
            loss.backward()
            step_loss += loss.item()
        losses.append(step_loss)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()

    reported = [loss / tokens for loss, tokens in record["reports"]]
    theirs = torch.tensor(reported).view(STEPS, MICRO_BATCHES).mean(dim=1)
    torch.testing.assert_close(theirs, torch.tensor(losses), rtol=1e-5, atol=0)
    assert losses[-1] < losses[0] - 0.05
    assert max(norms) > CLIP  # so that the clipping was part of the comparison
    assert logged(output, "grad norm") == pytest.approx(norms, abs=2e-3)  # it prints 3 decimals


def test_parallel_ranks_train_the_same_model(single, tmp_path: Path) -> None:
    layout = "--tensor-model-parallel-size 2 --sequence-parallel"
    experts = "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
    parallel = pretrain(tmp_path, f"{layout} {experts}", world_size=2)
    for name in ("lm loss", "seq_load_balancing_loss", "grad norm"):
        values = logged(single[0], name)
        assert len(values) == STEPS
        assert logged(parallel, name) == pytest.approx(values, rel=1e-4, abs=1.1e-3)


def test_unsupported_options_are_named_by_their_argument(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"hidden_dropout=0.1 .*--hidden-dropout 0"):
        pretrain(tmp_path, "--hidden-dropout 0.1")
