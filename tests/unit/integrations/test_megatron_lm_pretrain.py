"""Batches, loss and arguments for `megatron.training`; tests/functional trains with them."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

pytest.importorskip(
    "megatron.training", reason="the wheel of megatron-core 0.16.1 holds no megatron.training"
)

from megatron_coe.integrations import megatron_lm_pretrain as gpt


@pytest.fixture
def args(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    args = Namespace(check_for_nan_in_loss_and_grad=False)
    monkeypatch.setattr(gpt, "get_args", lambda: args)
    return args


def test_the_loss_is_summed_over_valid_positions(args) -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    loss, num_tokens, report = gpt.loss_function(mask, losses)
    loss.backward()
    assert torch.equal(losses.grad, mask)
    assert (loss.item(), num_tokens.item(), num_tokens.dtype) == (19.0, 3, torch.int32)
    assert report["lm loss"].tolist() == [19.0, 3.0] and not report["lm loss"].requires_grad


def test_a_loss_that_is_not_finite_ends_the_run(args) -> None:
    from megatron.core import rerun_state_machine

    args.check_for_nan_in_loss_and_grad = True
    rerun_state_machine.initialize_rerun_state_machine(mode=rerun_state_machine.RerunMode.DISABLED)
    try:
        with pytest.raises(RuntimeError, match="loss of a micro-batch is not finite"):
            gpt.loss_function(torch.ones(1, 1), torch.tensor([[torch.inf]]))
    finally:
        rerun_state_machine.destroy_rerun_state_machine()


def test_a_stage_in_the_middle_reads_nothing() -> None:
    assert set(gpt.get_batch(None).values()) == {None}


@pytest.mark.parametrize("name", gpt._IGNORED)
def test_an_argument_that_nothing_reads_is_refused(args, name) -> None:
    setattr(args, name, True)
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{flag} True .*pretrain_gpt.py.* Leave it out"):
        gpt.model_provider(True, True)
