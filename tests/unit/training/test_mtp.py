"""Multi-token prediction with CoE layers: its loss, too, is per token of the global batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from megatron_coe.megatron_compat.versions import clear_aux_losses
from megatron_coe.model.moe.layer import CoELayer
from tests.unit.training.runs import Sequences, make_settings, make_trainer

GLOBAL_BATCH, DEPTH, FACTOR = 4, 2, 0.3
MODEL = {
    "mtp_num_layers": DEPTH,
    "mtp_loss_scaling_factor": FACTOR,
    "moe_router_load_balancing_type": "none",
}


def gradients(trainer) -> dict[str, torch.Tensor]:
    (chunk,) = trainer.train_state.chunks
    return {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}


def objective_by_autograd(trainer, sequences: Sequences) -> dict[str, torch.Tensor]:
    """Gradient of main loss + factor / depth * losses of the later tokens, all over N tokens.

    From copies of the output layer's logits (Megatron's cross-entropy overwrites them),
    in one batch; its own way to hang the later losses on the hidden states is switched off.
    """
    (chunk,) = trainer.train_state.chunks
    items = [sequences[number] for number in range(GLOBAL_BATCH)]
    tokens, labels, mask, positions = (
        torch.stack([item[name] for item in items])
        for name in ("tokens", "labels", "loss_mask", "position_ids")
    )
    logits = []
    hook = chunk.module.output_layer.register_forward_hook(
        lambda _module, _inputs, output: logits.append(output[0].transpose(0, 1).clone())
    )
    MTPLossAutoScaler.set_loss_scale(torch.zeros(1))
    chunk.module.train()
    chunk.module(tokens, positions, None, labels=labels, loss_mask=mask)
    hook.remove()
    *later, main = logits
    assert len(later) == DEPTH

    def summed(logits_BSV: torch.Tensor, ahead: int) -> torch.Tensor:
        """Of the token `ahead` further on; the last positions have none."""
        kept = labels.shape[1] - ahead
        losses = F.cross_entropy(
            logits_BSV[:, :kept].transpose(1, 2), labels[:, ahead:], reduction="none"
        )
        return (losses * mask[:, ahead:]).sum()

    later_sums = sum(summed(logits_BSV, d) for d, logits_BSV in enumerate(later, start=1))
    chunk.zero_grad_buffer()
    trainer.train_state.optimizer.zero_grad()
    ((summed(main, 0) + FACTOR / DEPTH * later_sums) / mask.sum()).backward()
    clear_aux_losses()
    return gradients(trainer)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_gradient_is_the_objectives_whatever_the_micro_batch(single_rank, micro_batch_size):
    """Among the sequences is one with no label: alone in a micro-batch it must not divide by 0."""
    sequences = Sequences(3, frozenset({2}))
    settings = make_settings(
        train={"micro_batch_size": micro_batch_size, "clip_grad": 0.0}, model=MODEL
    )
    trainer = make_trainer(settings, single_rank, sequences)
    (chunk,) = trainer.train_state.chunks
    assert sum(isinstance(module, CoELayer) for module in chunk.module.mtp.modules()) == DEPTH
    trainer.step()
    measured, expected = gradients(trainer), objective_by_autograd(trainer, sequences)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        rounding = 1e-6 * gradient.abs().max().item()  # of sums in fp32, in an entry near 0
        torch.testing.assert_close(measured[name], gradient, rtol=1e-4, atol=rounding, msg=name)


def test_it_learns(single_rank):
    class Same(Sequences):
        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            return super().__getitem__(number % GLOBAL_BATCH)

    settings = make_settings(model=MODEL, train={"lr_warmup_fraction": 0.0})
    trainer = make_trainer(settings, single_rank, Same(3))
    losses = [trainer.metrics(trainer.step())["train_loss"] for _ in range(10)]
    assert losses[-1] < losses[0] - 0.5
