"""What a model learns does not depend on how transformers' Trainer splits the batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_coe.hf import CoeForCausalLM
from tests.unit.hf.small import small_model
from tests.unit.hf.training import SEQUENCES, examples, update_of_one_step

SPLITS = {"8 x 1": [1] * 8, "4 x 2": [2] * 4, "uneven": [3, 1, 4], "1 x 8": [8]}
ROOT = Path(__file__).parents[3]


def batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    chosen = examples()[rows]
    return {key: torch.stack([example[key] for example in chosen]) for key in chosen[0]}


def gradients(model: CoeForCausalLM) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("count", [int, torch.tensor], ids=["int", "tensor"])
@pytest.mark.parametrize("split", SPLITS)
def test_micro_batches_add_up_to_the_batch(split, count):
    """Each sequence's auxiliary loss counts by its share of the tokens with a label, as the
    cross-entropy does; Trainer adds up what the calls return and divides by nothing."""
    alpha = 0.3
    total = int((batch()["labels"][:, 1:] != -100).sum())
    oracle = small_model(aux_loss_alpha=alpha).double().train()
    for row in range(SEQUENCES):
        alone = batch(slice(row, row + 1))
        output = oracle(input_ids=alone["input_ids"])
        targets = alone["labels"][0, 1:]
        entropy = F.cross_entropy(output.logits[0, :-1], targets, reduction="sum")
        balance = output.aux_loss * int((targets != -100).sum())
        ((entropy + balance) / total).backward()
    expected = gradients(oracle)

    model = small_model(aux_loss_alpha=alpha).double().train()
    values, first = [], 0
    for size in SPLITS[split]:
        part = batch(slice(first, first + size))
        output = model(**part, num_items_in_batch=count(total))
        output.loss.backward()
        values.append(torch.stack([output.loss, output.aux_loss]).detach())
        first += size
    for name, gradient in gradients(model).items():  # the cross-entropy's are rounded to fp32
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    whole = model(**batch(), num_items_in_batch=total)
    torch.testing.assert_close(sum(values), torch.stack([whole.loss, whole.aux_loss]).detach())
    # The auxiliary loss is part of it, and its size the authors': of equal lengths the mean.
    plain = small_model(aux_loss_alpha=0.0).double().train()
    plain(**batch()).loss.backward()
    gate = "model.layers.0.mlp.gate.1.weight"
    assert (plain.get_parameter(gate).grad - expected[gate]).abs().max() > 1e-3
    equal = {"input_ids": batch()["input_ids"], "labels": batch()["input_ids"]}
    told = model(**equal, num_items_in_batch=count(SEQUENCES * 11)).aux_loss
    torch.testing.assert_close(told, model(**equal).aux_loss)


def test_an_aux_loss_of_the_whole_batch_keeps_its_weight():
    """It is one of the micro-batch: of equal micro-batches the batch's."""
    model = small_model(aux_loss_alpha=0.3, seq_aux=False).double().train()
    part = batch(slice(3, 5))
    total = 4 * int((part["labels"][:, 1:] != -100).sum())
    for _ in range(4):
        model(**part, num_items_in_batch=total).loss.backward()
    accumulated = gradients(model)
    model = small_model(aux_loss_alpha=0.3, seq_aux=False).double().train()
    model(**part).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-5, atol=1e-6)


def assert_alike(updates: list[dict[str, Tensor]]) -> None:
    for other in updates[1:]:
        for name, update in updates[0].items():
            torch.testing.assert_close(other[name], update, rtol=1e-4, atol=1e-6, msg=name)


def test_trainer_learns_the_same_however_it_accumulates(tmp_path):
    pytest.importorskip("accelerate")
    updates = [
        update_of_one_step(str(tmp_path), 0.1, size, SEQUENCES // size) for size in (8, 2, 1)
    ]
    assert_alike(updates)
    unbalanced = update_of_one_step(str(tmp_path), 0.0, 8, 1)
    gate = "model.layers.0.mlp.gate.1.weight"
    assert (updates[0][gate] - unbalanced[gate]).abs().max() > 1e-3


@pytest.mark.slow
def test_trainer_on_two_devices_learns_the_same_as_on_one(tmp_path):
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = (sys.executable, "-m", "tests.unit.hf.training", str(tmp_path))
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **where, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in "01"
    ]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    alone = update_of_one_step(str(tmp_path), 0.1, SEQUENCES, 1)
    assert_alike([alone, *torch.load(tmp_path / "updates.pt")])
