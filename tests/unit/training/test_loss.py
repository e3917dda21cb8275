"""The loss function of a micro-batch. (Its gradient through the model: test_loop.py.)"""

from __future__ import annotations

import pytest
import torch

from megatron_coe.training.loss import loss_scale, make_loss_function


def test_micro_batches_add_up_to_the_mean_over_valid_tokens():
    generator = torch.Generator().manual_seed(0)
    microbatches, replicas, B, S = 3, 2, 2, 5
    losses = torch.rand(replicas, microbatches, B, S, generator=generator, dtype=torch.float64)
    mask = (torch.rand(losses.shape, generator=generator) > 0.6).float()
    mask[0, 1] = 0  # one micro-batch without any valid token
    valid = mask.double().sum()
    scale = loss_scale(valid, losses.numel())
    leaf = losses.clone().float().requires_grad_()
    sums, positions = torch.zeros(2, dtype=torch.float64), 0
    for replica in range(replicas):
        for index in range(microbatches):
            function = make_loss_function(mask[replica, index], scale)
            loss, tokens, logged = function(leaf[replica, index])
            loss.backward()
            positions += tokens
            sums += logged
    leaf.grad /= positions  # as Megatron does
    assert sums[1] == valid
    mean = (losses * mask).sum() / valid
    assert sums[0] / valid == pytest.approx(mean.item(), rel=1e-6)
    torch.testing.assert_close(leaf.grad, mask / valid, rtol=1e-6, atol=0)


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_what_is_masked_does_not_matter(junk):
    losses = torch.tensor([[1.0, junk, 3.0]], requires_grad=True)
    loss, _, logged = make_loss_function(torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor(0.5))(losses)
    loss.backward()
    assert loss.item() == 2.0
    assert logged.tolist() == [4.0, 2.0]
    assert losses.grad.tolist() == [[0.5, 0.0, 0.5]]


def test_a_batch_without_valid_tokens_has_loss_zero():
    losses = torch.ones(2, 3, requires_grad=True)
    function = make_loss_function(torch.zeros(2, 3), loss_scale(torch.tensor(0.0), 6))
    loss, _, logged = function(losses)
    loss.backward()
    assert (loss.item(), logged.tolist()) == (0.0, [0.0, 0.0])
    assert not losses.grad.any()
